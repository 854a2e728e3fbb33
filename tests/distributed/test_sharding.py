"""Every arrangement of devices computes what one device does."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_model import make_model, parameters

from llama_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig
from llama_jax.data.loader import Batch
from llama_jax.distributed.fsdp import lookup
from llama_jax.distributed.mesh import (
    SEQUENCE_RULES,
    batch_sharding,
    batch_shards,
    constrain,
    make_mesh,
    partition_spec,
    shard_heads,
    shardings,
)
from llama_jax.errors import UsageError
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.model.execution import Execution
from llama_jax.training.loss import summed_nll
from llama_jax.training.step import jit_programs, make_execution, summed_gradients

AXES = ("data", "fsdp", "tensor")
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(shape) == 8]
QUICKEST = [(1, 1, 8), (2, 2, 2)]  # tied and untied; every axis is cut, and with every other
LONG = [(1, 4, 2), (2, 1, 4), (4, 2, 1)]
SEQUENCES = [(1, 1, 8), (2, 1, 4), (2, 2, 2)]
# Two kv heads: fewer than a tensor axis of 4 or 8 has devices.
SIZES = {"vocab_size": 56, "dim": 32, "num_heads": 8, "hidden_dim": 40, "num_layers": 3}
VARIANT = {"attention_bias": True, "mlp_bias": True, "sliding_window": 7}
B, T, D, V, L = 16, 24, 32, 56, 3


def slow_but(quick, shapes, long=()):
    """Return shapes with marks; what each of the `long` ones cuts, another of the rest does too."""
    marks = [
        [pytest.mark.as_used if shape in quick else pytest.mark.slow]
        + [pytest.mark.long] * (shape in long)
        for shape in shapes
    ]
    return [pytest.param(shape, marks=mark) for shape, mark in zip(shapes, marks)]


def mesh_of(shape):
    return make_mesh(MeshConfig(**dict(zip(AXES, shape))))


def make_config(accumulation=1, sequence=False, packing="none", **model):
    return Config(
        model=make_model(**SIZES | model).config,
        data=DataConfig(path="nowhere", batch_size=B, sequence_length=T, packing=packing),
        optimizer=OptimizerConfig(
            steps=9,
            learning_rate=1e-2,
            warmup_steps=1,
            accumulation_steps=accumulation,
        ),
        mesh=MeshConfig(sequence=sequence),
    )


def make_batch(packing="none"):
    """A batch; packed, its documents begin at other positions in every row, and all rows differ."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, V, (2, B, T), np.int32)
    weights = random.integers(0, 2, (B, T)).astype(np.float32)
    begins = random.random((B, T)) < 0.15
    segments = (1 + begins.cumsum(axis=1)).astype(np.int32) if packing == "documents" else None
    return Batch(inputs_BT=tokens, targets_BT=targets, weights_BT=weights, segments_BT=segments)


@functools.cache
def compiled(shape, config):
    """The program for loss and gradients on a mesh, and what it computes."""
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, shape))), jax.devices()[: math.prod(shape)])
    names = ("tied_embeddings", "dropout", "position", *VARIANT)
    changes = {name: getattr(config.model, name) for name in names}
    model = make_model(**SIZES | changes)
    key = jax.random.key(5)
    # One block to compile instead of three, as on other devices than CPUs.
    execution = dataclasses.replace(make_execution(config, mesh), unroll=1)
    with jax.set_mesh(mesh):
        places = shardings(model, mesh)
        given = (
            jax.device_put(model, places),
            jax.device_put(make_batch(config.data.packing), batch_sharding(mesh)),
        )
        step = jax.jit(
            lambda model, batch: summed_gradients(model, None, batch, key, config, execution),
            out_shardings=(None, places),
        )
        program = step.lower(*given).compile()
        return program.as_text(), jax.device_get(program(*given))


def assert_equal_to_one_device(shape, config, alone):
    expected = compiled((1, 1, 1), alone)[1]
    got = compiled(shape, config)[1]
    tokens = expected[0]["weights"]
    for result, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result / tokens, right / tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", slow_but(QUICKEST[1:], SHAPES, LONG), ids=str)
def test_on_every_mesh_loss_and_gradients_are_those_of_one_device(shape):
    """Tied and untied in turns; accumulated, while the one device takes the whole batch."""
    tied = SHAPES.index(shape) % 2 == 0
    accumulation = 1 if shape == (1, 1, 8) else 2  # 1: a program that another test needs, too
    config = make_config(accumulation, tied_embeddings=tied)
    assert_equal_to_one_device(shape, config, make_config(tied_embeddings=tied))


@pytest.mark.parametrize("shape", slow_but([(1, 1, 8)], SEQUENCES, [(2, 2, 2)]), ids=str)
def test_with_sequences_cut_too(shape):
    """Of a model with biases and a sliding window."""
    tied = shape == (2, 1, 4)
    config = make_config(sequence=True, tied_embeddings=tied, **VARIANT)
    assert_equal_to_one_device(shape, config, make_config(tied_embeddings=tied, **VARIANT))


@pytest.mark.slow
@pytest.mark.parametrize("position", ["absolute", pytest.param("relative", marks=pytest.mark.slow)])
def test_with_learned_positions_too(position):
    """Tables gathered, and slopes sharded with their heads; in packed documents."""
    config = make_config(packing="documents", position=position)
    assert_equal_to_one_device((1, 2, 4), config, config)
    got = parameters(compiled((1, 2, 4), config)[1][1])
    learned = got["slopes" if position == "relative" else "position_embedding"]
    assert np.abs(learned[...]).max() > 0


@pytest.mark.parametrize(
    ("shape", "sequence"),
    [
        pytest.param((2, 2, 2), True, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), False, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), False, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param((1, 1, 8), True, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
    ids=str,
)
def test_of_packed_documents_too(shape, sequence):
    alone = make_config(packing="documents")
    config = make_config(accumulation=2, sequence=sequence, packing="documents")
    assert_equal_to_one_device(shape, config, alone)
    as_one_text = compiled((1, 1, 1), make_config())[1][0]["loss"]
    assert abs(compiled((1, 1, 1), alone)[1][0]["loss"] / as_one_text - 1) > 1e-4


def test_validation_is_cut_as_training_is():
    """Sequences between blocks too, and the loss is that of one device."""
    config, mesh = make_config(sequence=True), mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        model = make_model(**SIZES)
        given = (
            jax.device_put(model, shardings(model, mesh)),
            None,
            jax.device_put(make_batch(), batch_sharding(mesh)),
        )
        program = jit_programs(config, mesh).evaluate.lower(*given).compile()
        sums = program(*given)
    expected = compiled((1, 1, 1), make_config())[1][0]
    for name, total in expected.items():
        np.testing.assert_allclose(sums[name], total, rtol=1e-5)
    assert (B // 4, T // 2, D) in arrays_in(program.as_text())


@pytest.mark.slow
def test_dropout_draws_for_a_row_the_same_wherever_it_is():
    """Also the one test here of the `xla` attention, which alone can drop."""
    config = make_config(dropout=0.3)
    assert_equal_to_one_device((2, 2, 2), config, config)
    without = compiled((1, 1, 1), make_config())[1][0]["loss"]
    assert abs(compiled((1, 1, 1), config)[1][0]["loss"] / without - 1) > 1e-4


def test_left_to_the_compiler_it_is_the_same():
    """Evaluation code of others, such as scores, runs the model without `data_parallel`."""
    model, batch = make_model(**SIZES), make_batch()

    execution = Execution(
        attention=shard_heads(blockwise_attention), constrain=constrain, lookup=lookup
    )

    def nll(model, batch):
        hidden_BTD, _ = model.hidden(batch.inputs_BT, execution=execution)
        return summed_nll(hidden_BTD, model.output_VD, batch.targets_BT, batch.weights_BT)

    mesh = mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        got = jax.jit(nll)(placed, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(got, compiled((1, 1, 1), make_config())[1][0]["loss"], rtol=1e-5)


def arrays_in(text):
    """The shapes of all arrays in a program."""
    found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return {tuple(map(int, shape.split(","))) for shape in found}


def test_with_sequences_cut_no_device_keeps_a_whole_one_between_blocks():
    """What a block's backward pass needs of the block before is kept for all layers."""
    whole, part = (L, B, T, D), (L, B, T // 8, D)
    for sequence, seen in ((True, part), (False, whole)):
        config = make_config(sequence=sequence, tied_embeddings=sequence is False)
        kept = arrays_in(compiled((1, 1, 8), config)[0]) & {whole, part}
        assert kept == {seen}


def test_no_device_makes_logits_of_the_whole_vocabulary():
    shapes = arrays_in(compiled((1, 1, 8), make_config(sequence=True, tied_embeddings=False))[0])
    assert (B * T, V // 8) in shapes
    assert not [shape for shape in shapes if V in shape]


def test_sequences_are_sharded_by_their_own_rules_only():
    axes, shape, mesh = ("batch", "length", "residual"), (8, 6, 24), mesh_of((2, 2, 2))
    cut, whole = (PartitionSpec(("data", "fsdp"), length, None) for length in ("tensor", None))
    assert partition_spec(axes, shape, mesh, SEQUENCE_RULES) == cut
    assert partition_spec(axes, shape, mesh) == whole


@pytest.fixture(scope="module")
def problem():
    """A model whose parameters are cut."""
    return (make_model(vocab_size=V, dim=32, num_heads=8, num_layers=2),)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((8, 1, 1), {"embedding": (56, 32), "wq": (2, 32, 8, 4), "norm": (32,)}),
        ((1, 8, 1), {"embedding": (56, 4), "wq": (2, 4, 8, 4), "down": (2, 40, 4), "norm": (4,)}),
        ((2, 2, 2), {"embedding": (28, 16), "wq": (2, 16, 4, 4), "wk": (2, 16, 1, 4)}),
        ((2, 2, 2), {"wo": (2, 4, 4, 16), "gate": (2, 16, 20), "down": (2, 20, 16)}),
        ((1, 2, 4), {"wk": (2, 16, 2, 4), "wq": (2, 16, 2, 4), "up": (2, 16, 10)}),
    ],
)
def test_a_device_holds_its_part_of_each_parameter(problem, shape, parts):
    model, mesh = problem[0], mesh_of(shape)
    specs = parameters(shardings(model, mesh))
    for name, part in parts.items():
        whole = parameters(model)[name].shape
        assert specs[name].get_value().shard_shape(whole) == part, name


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (24, 40), ("fsdp", "tensor")),
        (("embed", "mlp"), (3, 24, 40), (None, "fsdp", "tensor")),
        (("vocab", "embed"), (53, 24), (None, "fsdp")),
        (("batch", "length", "residual"), (8, 7, 24), (("data", "fsdp"), None, None)),
        (("batch", "length", "residual"), (6, 7, 24), (None, None, None)),
        (("embed", "kv_heads", "head_dim"), (24, 2, 4), ("fsdp", "tensor", None)),
        (("embed", "kv_heads", "head_dim"), (24, 1, 4), ("fsdp", None, None)),
    ],
)
def test_dims_lie_along_the_mesh_where_it_divides_them(axes, shape, spec):
    assert partition_spec(axes, shape, mesh_of((2, 2, 2))) == PartitionSpec(*spec)


def test_a_batch_is_cut_over_data_and_fsdp():
    mesh = mesh_of((2, 2, 2))
    assert batch_shards(mesh) == 4
    assert batch_sharding(mesh).shard_shape((8, 7)) == (2, 7)


def test_what_is_no_parameter_is_replicated():
    mesh = mesh_of((2, 2, 2))
    assert shardings({"count": jnp.zeros(8)}, mesh)["count"].is_fully_replicated


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((8, 7, 24))
    assert constrain(x, "batch", "length", "residual") is x


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 1), (1, 8, 1))],
)
def test_minus_one_takes_the_devices_left(sizes, shape):
    assert tuple(mesh_of(sizes).shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ((3, 1, 1), (8, 1, 1)),
        ((-1, 3, 1), (2, 4, 1)),
        ((-1, 16, 1), (1, 8, 1)),
        ((1, 1, 1), (8, 1, 1)),
        ((2, 1, 3), (2, 1, 4)),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes, nearest):
    nearest_sizes = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, nearest))
    with pytest.raises(UsageError, match="do not multiply to 8 devices") as refused:
        mesh_of(sizes)
    nearest = f"the nearest sizes that do are {nearest_sizes}; see docs/pods.md"
    assert str(refused.value).endswith(nearest)


def test_a_mesh_over_some_of_the_devices():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
