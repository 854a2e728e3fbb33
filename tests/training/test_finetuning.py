"""Fine-tuning: what is trained, what stays, and what a resumed run and its checkpoints hold."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY

from llama_jax.config import (
    Config,
    DataConfig,
    DpoConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from llama_jax.data.loader import Batch
from llama_jax.distributed.mesh import batch_sharding, make_mesh
from llama_jax.training.objectives import model_of
from llama_jax.training.step import (
    init_state,
    jit_train_step,
    make_execution,
    state_shardings,
    summed_gradients,
)

B, T, V = 16, 12, 54


def make_config(loss="next_token", accumulation=1, dropout=0.0, beta=0.3, smoothing=0.0, **lora):
    return Config(
        model=ModelConfig(**TINY | {"vocab_size": V}),
        data=DataConfig(path="nowhere", batch_size=B, sequence_length=T, packing="documents"),
        optimizer=OptimizerConfig(
            steps=100,
            learning_rate=1e-2,
            warmup_steps=0,
            accumulation_steps=accumulation,
            loss=loss,
        ),
        run=RunConfig(seed=3, init_from="nowhere"),
        lora=LoraConfig(**{"rank": 3, "alpha": 6.0, "dropout": dropout} | lora),
        dpo=DpoConfig(beta=beta, label_smoothing=smoothing),
    )


def make_batch(seed=0):
    """Two documents a sequence, of which ragged parts are trained on."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, V, (B, T + 1), np.int32)
    split = random.integers(4, T - 3, (B, 1))
    segments = np.where(np.arange(T) < split, 1, 2).astype(np.int32)
    weights = (random.random((B, T)) < np.linspace(0.2, 0.9, B)[:, None]).astype(np.float32)
    weights[:, [3, T - 1]] = 1  # something of each document
    return Batch(
        inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], weights_BT=weights, segments_BT=segments
    )


def perturbed(state, seed=7):
    """The state with adapters that change something."""

    def noise(path, x):
        random = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        return x + 0.1 * random.standard_normal(x.shape, np.float32)

    return dataclasses.replace(
        state, trainable=jax.tree_util.tree_map_with_path(noise, state.trainable)
    )


@functools.cache
def program(config, mesh):
    """Return the program of `gradients`, compiled once for all tests that can share it."""
    execution = make_execution(config, mesh)
    return jax.jit(lambda *args: summed_gradients(*args, jax.random.key(5), config, execution))


def gradients(config, state, batch, mesh=None):
    return program(config, mesh)(state.trainable, state.frozen, batch)


def assert_close(got, expected, tolerance):
    """Compare sums and gradients; an array by its largest element.

    Rewards are differences of log-probabilities of some hundred nats in all, rounded at 1e-7 each.
    """
    for name, total in expected[0].items():
        np.testing.assert_allclose(got[0][name], total, rtol=tolerance, atol=2e-5)
    for x, y in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def test_adapters_change_nothing_at_first():
    config, batch = make_config(targets="linear,embedding"), make_batch()
    state = init_state(config)
    adapted = model_of(config, state.trainable, state.frozen)
    np.testing.assert_array_equal(adapted(batch.inputs_BT)[0], state.frozen(batch.inputs_BT)[0])


@pytest.mark.parametrize(
    ("loss", "base"),
    [
        ("next_token", "compute"),
        pytest.param("dpo", "compute", marks=pytest.mark.slow),
        pytest.param("next_token", "nf4", marks=pytest.mark.slow),
    ],
)
def test_only_adapters_learn_and_the_base_stays_to_the_bit(loss, base):
    config, batch = make_config(loss, base=base, double_quantization=base == "nf4"), make_batch()
    state, mesh = perturbed(init_state(config)), make_mesh(MeshConfig(), jax.devices()[:1])
    before = jax.device_get(state)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, state_shardings(config, mesh))
        after, metrics = jit_train_step(config, mesh)(
            state, jax.device_put(batch, batch_sharding(mesh))
        )
    assert metrics.healthy and metrics.gradient_norm > 0
    for x, y in zip(jax.tree.leaves(before.frozen), jax.tree.leaves(after.frozen), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(before.trainable), jax.tree.leaves(after.trainable)):
        assert np.abs(x - y).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["next_token", "dpo"])
def test_accumulated_is_the_whole_batch(loss):
    """The sums over microbatches are those of each alone, and of all at once but for rounding.

    Programs of two shapes round each layer's sums in other places: 7 to 11 units in the last
    place by norm, with XLA's optimizations and without, in jaxlib 0.10 and 0.12.
    """
    batch, alone, accumulating = make_batch(), make_config(loss), make_config(loss, accumulation=4)
    state = perturbed(init_state(alone))
    got = gradients(accumulating, state, batch)
    microbatches = [jax.tree.map(lambda x, n=n: x[n::4], batch) for n in range(4)]
    parts = [gradients(alone, state, part) for part in microbatches]
    assert_close(got, jax.tree.map(lambda *each: sum(each), *parts), 1e-6)
    expected = gradients(alone, state, batch)
    assert_close((got[0], []), (expected[0], []), 1e-6)
    for x, y in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.linalg.norm(x - y) < 16 * np.finfo(np.float32).eps * np.linalg.norm(y)


@pytest.mark.slow
def test_recomputed_on_a_quantized_base_is_the_same():
    config, batch = make_config(base="nf4", dropout=0.2), make_batch()
    state = perturbed(init_state(config))
    run = dataclasses.replace(config.run, remat="block")
    recomputed = gradients(dataclasses.replace(config, run=run), state, batch)
    assert_close(recomputed, gradients(config, state, batch), 1e-5)


@pytest.mark.slow
def test_packed_documents_are_those_apart():
    """The sums over two documents in a sequence are those of each in a sequence of its own."""
    config, batch = make_config(), make_batch()
    state = perturbed(init_state(config))
    sums, expected = gradients(config, state, batch)

    def alone(number):
        """Each sequence with one of its documents, moved to the start; the rest is padding."""
        order = np.argsort(batch.segments_BT != number, axis=1, kind="stable")
        moved = [np.take_along_axis(array, order, 1) for array in dataclasses.astuple(batch)]
        weights = moved[2] * (moved[3] == number)
        return Batch(inputs_BT=moved[0], targets_BT=moved[1], weights_BT=weights, segments_BT=None)

    parts = [gradients(config, state, alone(number)) for number in (1, 2)]
    assert_close(jax.tree.map(lambda x, y: x + y, *parts), (sums, expected), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["next_token", "dpo"])
def test_sharded_is_the_same_as_one_device(loss):
    config = make_config(loss, dropout=0.2, targets="linear,embedding")
    batch, state = make_batch(), perturbed(init_state(config))
    expected = gradients(config, state, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, state_shardings(config, mesh))
        got = gradients(config, placed, jax.device_put(batch, batch_sharding(mesh)), mesh)
    assert_close(got, expected, 2e-5)


def test_masked_tokens_have_no_gradient():
    """The gradient of a masked batch is that of the trained tokens, whatever the others are."""
    config, batch = make_config(), make_batch()
    state = perturbed(init_state(config))
    other = np.where(batch.weights_BT > 0, batch.targets_BT, (batch.targets_BT + 1) % V)
    changed = dataclasses.replace(batch, targets_BT=other.astype(np.int32))
    assert_close(gradients(config, state, changed), gradients(config, state, batch), 0)


def plain_dpo(config, state, batch):
    """The mean DPO loss of a batch as in the paper, from logits of whole sequences."""
    policy = model_of(config, state.trainable, state.frozen)

    def answers(model):
        hidden, _ = model.hidden(batch.inputs_BT, segments_BT=batch.segments_BT)
        logprobs = jax.nn.log_softmax(model.logits(hidden))
        chosen = jnp.take_along_axis(logprobs, batch.targets_BT[:, :, None], -1)[:, :, 0]
        kept = chosen * batch.weights_BT
        return [jnp.where(batch.segments_BT == n, kept, 0).sum(1) for n in (1, 2)]

    (chosen, rejected), (old_chosen, old_rejected) = answers(policy), answers(state.frozen)
    margin = config.dpo.beta * ((chosen - old_chosen) - (rejected - old_rejected))
    smoothing = config.dpo.label_smoothing
    losses = -(1 - smoothing) * jax.nn.log_sigmoid(margin)
    return (losses - smoothing * jax.nn.log_sigmoid(-margin)).mean()


def test_dpo_loss_and_gradient_are_those_of_the_formula():
    config, batch = make_config("dpo", smoothing=0.1), make_batch()
    state = perturbed(init_state(config))
    sums, got = gradients(config, state, batch)

    def loss(trainable):
        return plain_dpo(config, dataclasses.replace(state, trainable=trainable), batch)

    value, expected = jax.jit(jax.value_and_grad(loss))(state.trainable)
    assert sums["weights"] == B
    assert float(sums["loss"] / B) == pytest.approx(float(value), rel=1e-5)
    assert_close(({}, got), ({}, jax.tree.map(lambda x: x * B, expected)), 1e-5)
