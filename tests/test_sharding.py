"""Every arrangement of devices computes what one device does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model, parameters
from jax.sharding import PartitionSpec

from llama_jax import self_attention
from llama_jax.config import MeshConfig
from llama_jax.errors import UsageError
from llama_jax.loss import summed_nll
from llama_jax.sharding import (
    batch_parts,
    batch_sharding,
    constrain,
    make_mesh,
    partition_spec,
    place_batch,
    shardings,
)

B, T, V = 16, 7, 56  # a vocabulary that the tensor axis can cut
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2), (2, 2, 2)]
AXES = ("data", "fsdp", "tensor")


def mesh_of(shape):
    return make_mesh(MeshConfig(**dict(zip(AXES, shape))))


def loss_and_gradients(model, tokens_BT, weights_BT):
    def mean_nll(model):
        hidden_BTD, _ = model.hidden(tokens_BT)
        targets_BT = jnp.roll(tokens_BT, -1, axis=1)
        total = summed_nll(hidden_BTD, model.output_VD, targets_BT, weights_BT)
        return total / weights_BT.sum()

    return jax.value_and_grad(mean_nll)(model)


QUICK = {"xla_backend_optimization_level": 0}  # of the compiler: halves the time of these tests
compiled = jax.jit(loss_and_gradients, compiler_options=QUICK)


@pytest.fixture(scope="module")
def problem():
    """A model, a batch, and their loss and gradients on one device."""
    # Eight query heads and two kv heads: an axis may cut both, or the first only.
    model = make_model(vocab_size=V, dim=32, num_heads=8, num_layers=2)
    random = np.random.default_rng(0)
    batch = random.integers(0, V, (B, T)), random.integers(0, 2, (B, T)).astype(np.float32)
    return model, batch, compiled(model, *batch)


def check(problem, shape, step=compiled):
    model, batch, expected = problem
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        got = step(placed, *place_batch(batch, mesh))
    for result, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_sharded_equals_a_single_device(problem, shape):
    check(problem, shape)


def test_sharded_equals_a_single_device_off_the_cpu_path_too(problem, monkeypatch):
    monkeypatch.setattr(self_attention, "FASTEST", {})
    fresh = jax.jit(lambda *given: loss_and_gradients(*given), compiler_options=QUICK)
    check(problem, (2, 2, 2), fresh)


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
    assert batch_parts(mesh) == 4
    assert batch_sharding(mesh).shard_shape((8, 7)) == (2, 7)
    rows = np.arange(56).reshape(8, 7)
    placed = place_batch({"rows": rows}, mesh)["rows"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == batch_sharding(mesh)


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


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, 16, 1), (1, 1, 1)])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    with pytest.raises(UsageError, match="do not arrange 8 devices"):
        mesh_of(sizes)


def test_a_mesh_over_some_of_the_devices():
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
