"""Rematerialisation policies: the same gradients, less memory, and only the named work redone."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from tiny_model import TINY, make_model

from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from llama_jax.data.loader import abstract_batch
from llama_jax.distributed.mesh import make_mesh
from llama_jax.errors import UsageError
from llama_jax.kernels.attention import xla_attention
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.model.execution import Execution, choose_remat
from llama_jax.planning.compile import target_mesh
from llama_jax.planning.targets import parse_target
from llama_jax.training.step import abstract_state, jit_train_step, make_execution

AGAIN = ("block", "save-qkv", "offload", "save-matmuls")
B, T = 4, 32
TOKENS_BT = np.random.default_rng(0).integers(0, TINY["vocab_size"], (B, T), np.int32)


def gradients(policy, attention=xla_attention, **changes):
    """A traced function of the model's parameters, and those parameters."""
    model = make_model(**changes)
    weights_D = jnp.arange(1.0, TINY["dim"] + 1)

    def objective(model):
        execution = Execution(remat=policy, attention=attention)
        hidden_BTD, _ = model.hidden(TOKENS_BT, execution=execution)
        return jnp.sum(jnp.sin(hidden_BTD) @ weights_D)

    return jax.jit(jax.grad(objective)).trace(model), model


@functools.cache
def compiled(policy):
    return gradients(policy)[0].lower().compile()


def matrix_products(policy, attention=xla_attention):
    """How many there are in the program of a model of one layer."""
    return (
        gradients(policy, attention, num_layers=1)[0]
        .lower()
        .as_text()
        .count("stablehlo.dot_general")
    )


@pytest.mark.parametrize("policy", slow_but(["block", "save-qkv"], AGAIN))
def test_gradients_are_those_of_keeping_everything(policy):
    model = make_model()
    expected, found = (jax.tree.leaves(compiled(name)(model)) for name in ("none", policy))
    for one, other in zip(expected, found):
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6 * np.abs(one).max())


def test_each_policy_recomputes_what_it_should():
    """A block has nine products: q, k, v, scores, mixing, o, gate, up and down.

    Of the last one no backward pass needs the outcome.
    """
    none = matrix_products("none")
    assert none == 3 * 9 + 1  # forward once, backward twice; and that of the objective
    assert matrix_products("block") - none == 8
    assert matrix_products("save-qkv") - none == 8 - 3
    assert matrix_products("offload") - none == 8 - 3
    assert matrix_products("save-matmuls") - none == 2  # scores and o


def test_save_matmuls_keeps_all_that_a_flash_attention_needs():
    none, kept = (matrix_products(name, blockwise_attention) for name in ("none", "save-matmuls"))
    assert kept - none == 1  # o


def test_auto_keeps_everything_on_cpu_alone():
    chosen = [choose_remat("auto", platform) for platform in ("cpu", "tpu", "gpu")]
    assert chosen == ["none", "save-matmuls", "save-matmuls"]
    assert choose_remat("block", "cpu") == "block"
    assert make_execution(step_config("auto")).remat == "none"


@pytest.mark.slow
@pytest.mark.as_used
def test_memory_falls_as_less_is_kept():
    taken = {name: compiled(name).memory_analysis().temp_size_in_bytes for name in ("none", *AGAIN)}
    heads = TINY["num_heads"] + 2 * TINY["num_kv_heads"]
    qkv = TINY["num_layers"] * B * T * heads * TINY["dim"] // TINY["num_heads"] * 4
    assert taken["save-qkv"] - taken["block"] == pytest.approx(qkv, rel=0.05)
    assert taken["none"] > 2 * taken["save-qkv"]
    assert taken["none"] > taken["save-matmuls"] > taken["save-qkv"]
    assert taken["offload"] == taken["save-qkv"]  # the memory of a CPU is the host's


def test_offloading_moves_queries_keys_and_values_to_a_tpus_host_and_back():
    traced, _ = gradients("offload")
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for place in ("pinned_host", "device"):
        assert text.count(f'_xla_buffer_placement = "{place}"') == 3
    assert "pinned_host" not in gradients("save-qkv")[0].lower().as_text()


def step_config(policy, **sizes):
    return Config(
        model=ModelConfig(**TINY | {"vocab_size": 54} | sizes),
        data=DataConfig(path="nowhere", batch_size=8, sequence_length=T),
        optimizer=OptimizerConfig(steps=2, learning_rate=1e-3, warmup_steps=1),
        mesh=MeshConfig(data=1, fsdp=4),
        run=RunConfig(remat=policy),
    )


def test_the_train_step_of_a_config_recomputes_what_its_policy_says():
    def matmuls(policy):
        config = step_config(policy, num_layers=1)  # more layers are unrolled where all is kept
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        step = jit_train_step(config, mesh).lower(abstract_state(config), abstract_batch(config))
        return step.as_text().count("stablehlo.dot_general")

    none, qkv, block = map(matmuls, ("none", "save-qkv", "block"))
    assert (qkv > none, block - qkv) == (True, 3)  # queries, keys and values are kept or not


def test_devices_without_host_memory_are_refused_in_one_line(monkeypatch):
    memory = SimpleNamespace(kind="device")
    device = SimpleNamespace(
        addressable_memories=lambda: [memory], device_kind="Abacus", platform="abacus"
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(UsageError) as error:
        make_execution(step_config("offload"))
    assert str(error.value) == (
        "run.remat='offload' needs memory of kind pinned_host and Abacus has only device;"
        " use run.remat='save-qkv', or 'block' for the least memory"
    )


@pytest.mark.slow
@pytest.mark.as_used  # libtpu 0.0.52 crashes with the settings of quick compilation
@pytest.mark.parametrize(("policy", "is_on_host"), [("offload", True), ("save-qkv", False)])
def test_the_tpu_compiler_compiles_the_step_of_a_sharded_model(policy, is_on_host):
    pytest.importorskip("libtpu")
    config = step_config(policy)
    mesh = target_mesh(config.mesh, parse_target("v5e-4"))
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        step = jit_train_step(config, mesh).lower(state, abstract_batch(config)).compile()
    assert ("S(5)" in step.as_text()) == is_on_host  # the memory space of the host
