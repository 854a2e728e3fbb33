"""One step of training: the same if accumulated, sharded or recomputed; none if non-finite."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collective_axes import axes_of
from tiny_model import TINY

from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from llama_jax.data.loader import Batch
from llama_jax.distributed.mesh import batch_sharding, make_mesh, shardings
from llama_jax.errors import UsageError
from llama_jax.hardware.hlo import collectives
from llama_jax.training.objectives import next_token_loss
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.step import (
    TrainState,
    abstract_state,
    init_state,
    jit_programs,
    jit_train_step,
    make_execution,
    state_shardings,
    summed_gradients,
    train_step,
)

B, T = 16, 11
V = 54  # even, to lie along a tensor axis of 2


def make_config(accumulation=1, dropout=0.0, remat="none", z_loss=0.0, **model):
    return Config(
        model=ModelConfig(**TINY | {"vocab_size": V, "dropout": dropout} | model),
        data=DataConfig(path="nowhere", batch_size=B, sequence_length=T),
        optimizer=OptimizerConfig(
            steps=100,
            learning_rate=1e-2,
            warmup_steps=2,
            accumulation_steps=accumulation,
            z_loss=z_loss,
        ),
        run=RunConfig(seed=3, remat=remat),
    )


def make_batch(step=0, ragged=True):
    """A batch whose rows have very different numbers of tokens, as padding makes them."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, V, (B, T + 1), np.int32)
    lengths = np.linspace(1, T, B).astype(int) if ragged else np.full(B, T)
    weights = (np.arange(T) < lengths[:, None]).astype(np.float32)
    return Batch(inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], weights_BT=weights)


one_device = partial(make_mesh, MeshConfig(data=1), jax.devices()[:1])


def rolled_up(config, mesh):
    """Return an execution of which one block is compiled, as on other devices than CPUs."""
    return dataclasses.replace(make_execution(config, mesh), unroll=1)


@functools.cache
def step_function(config, mesh):
    """Return a step that is compiled once for all tests that can share it."""
    return jit_train_step(config, mesh, rolled_up(config, mesh))


@functools.cache
def first_state(config):
    """The state before the first step, on the host."""
    return jax.device_get(init_state(config))


def begin(config, mesh):
    return jax.device_put(first_state(config), state_shardings(config, mesh))


def run(config, mesh=None, steps=3):
    """The state and the losses after some steps from the start."""
    mesh = mesh or one_device()
    with jax.set_mesh(mesh):
        state, step = begin(config, mesh), step_function(config, mesh)
        metrics_of_steps = []
        for number in range(steps):
            state, metrics = step(state, make_batch(number))
            metrics_of_steps.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return jax.device_get(state), metrics_of_steps


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_close(states, tolerance=1e-5):
    for first, second in zip(*map(arrays, states)):
        np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance)


def assert_same(states):
    for first, second in zip(*map(arrays, states)):
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def whole():
    """Three steps with whole batches on one device."""
    return run(make_config())


def test_a_batch_cut_into_microbatches_gives_the_same_update(whole):
    state, metrics_of_steps = run(make_config(accumulation=4))
    assert_close([state.trainable, whole[0].trainable])
    for metrics, expected in zip(metrics_of_steps, whole[1]):
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
        assert metrics.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_the_loss_is_a_mean_over_tokens_not_over_microbatches(whole):
    """The batch above could tell: the mean of its microbatches' means is another number."""
    config, batch = make_config(), make_batch()
    model, evaluate = init_state(config).trainable, jit_programs(config, one_device()).evaluate
    sums = evaluate(model, None, batch)
    assert whole[1][0].loss == pytest.approx(float(sums["loss"] / sums["weights"]), rel=1e-5)

    def part(start):
        weights_BT = np.zeros_like(batch.weights_BT)
        weights_BT[start : start + 4] = batch.weights_BT[start : start + 4]
        return evaluate(model, None, dataclasses.replace(batch, weights_BT=weights_BT))

    parts = [part(start) for start in (0, 4, 8, 12)]
    of_means = np.mean([sums["loss"] / sums["weights"] for sums in parts])
    assert abs(of_means / whole[1][0].loss - 1) > 1e-4


@pytest.mark.slow
def test_on_a_mesh_training_goes_as_on_one_device(whole):
    """Gradients on all meshes: test_sharding."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state, metrics_of_steps = run(make_config(accumulation=2), mesh)
    losses = [metrics.loss for metrics in metrics_of_steps]
    np.testing.assert_allclose(losses, [metrics.loss for metrics in whole[1]], rtol=1e-5)
    assert_close([state.trainable, whole[0].trainable], 2e-5)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(whole):
    """Gradients by each policy: `test_remat`."""
    state, metrics_of_steps = run(make_config(remat="block"))
    assert metrics_of_steps[2].loss == pytest.approx(whole[1][2].loss, rel=1e-5)
    assert_close([state.trainable, whole[0].trainable])


def test_the_z_loss_is_learned_from_and_not_reported(whole):
    _, metrics_of_steps = run(make_config(z_loss=0.1), steps=1)
    assert metrics_of_steps[0].loss == pytest.approx(whole[1][0].loss, rel=1e-5)
    assert abs(metrics_of_steps[0].gradient_norm / whole[1][0].gradient_norm - 1) > 1e-3


def norm_loss(norm, model, batch, **settings):
    """A loss whose trainable part is the final norm alone; the rest of the model is frozen."""
    model = jax.tree.map(lambda leaf: leaf, model)  # a shallow copy
    model.norm = norm
    return next_token_loss(model, None, batch, **settings)


def test_frozen_parameters_stay_and_trainable_ones_follow_the_loss():
    config = make_config(accumulation=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = first_state(config).trainable
    optimizer = make_optimizer(config.optimizer).init(model.norm)
    state = TrainState(jnp.int32(0), jnp.bool(True), model.norm, model, optimizer)
    settings = {"config": config, "execution": rolled_up(config, mesh)}
    step = jax.jit(partial(train_step, loss=norm_loss, **settings))
    gradients_of = jax.jit(partial(summed_gradients, key=jax.random.key(0), **settings))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, shardings(state, mesh))
        batch = jax.device_put(make_batch(), batch_sharding(mesh))
        after, metrics = step(state, batch)
        after, _ = jax.device_get(step(after, batch))  # the rate of the first step is 0
        sums, gradients = jax.device_get(gradients_of(state.frozen, None, batch))
    tokens = sums["weights"]
    assert_same([model, after.frozen])
    assert metrics.loss == pytest.approx(sums["loss"] / tokens, rel=1e-5)
    norm = np.linalg.norm(gradients.norm.scale[...] / tokens)
    assert metrics.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert np.all(after.trainable.scale[...] != model.norm.scale[...])


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_traced():
    mesh = make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    with pytest.raises(UsageError, match=r"model.num_heads=6 does not divide over mesh.tensor=4"):
        jit_train_step(make_config(), mesh)


# What crosses the network, read from the compiled program.


def sent_by(config, sizes):
    """The collectives of a step on eight devices."""
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        lowered = step_function(config, mesh).lower(abstract_state(config), make_batch())
    return collectives(lowered.compile().as_text())


def parameter_bytes(config):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(first_state(config).trainable))


def test_gradients_cross_the_network_once_however_many_microbatches():
    config, sizes = make_config(), {"data": 4, "fsdp": 2, "tensor": 1}
    once, twice = (
        [
            (one.kind, one.bytes, one.times)
            for one in sent_by(make_config(accumulation), sizes)
            if "data" in axes_of(one, sizes) and one.bytes > 100  # but for sums of scalars
        ]
        for accumulation in (1, 2)
    )
    assert sorted(once) == sorted(twice)
    assert {(kind, times) for kind, _, times in twice} == {("all-reduce", 1)}
    assert sum(size for _, size, _ in twice) == pytest.approx(parameter_bytes(config) / 2, rel=0.01)


@pytest.mark.as_used
@pytest.mark.parametrize(
    "remat",
    [
        "block",
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("save-matmuls", marks=pytest.mark.slow),
    ],
)
def test_fsdp_sends_no_more_than_the_textbook(remat):
    """Parameters gathered for the forward and for the backward pass, gradients scattered once."""
    config = make_config(remat=remat)
    found = sent_by(config, {"data": 1, "fsdp": 8})
    sent = sum(one.sent(8) * one.times for one in found)
    textbook = 3 * parameter_bytes(config) * 7 / 8
    assert 0.9 * textbook < sent <= 1.1 * textbook
    kinds = {one.kind: one for one in sorted(found, key=lambda one: one.bytes)}
    assert kinds["all-reduce"].bytes < 200  # scalars alone
    table = config.model.vocab_size * config.model.dim * 4
    assert kinds["all-gather"].bytes <= table  # a layer's parameters, never those of all layers


@pytest.mark.slow
def test_on_two_axes_too_no_device_ever_has_all_parameters():
    config, sizes = make_config(), {"data": 1, "fsdp": 4, "tensor": 2}
    found = sent_by(config, sizes)
    assert {one.kind for one in found if axes_of(one, sizes) == ("tensor",)} == {"all-reduce"}
    gathered = [one for one in found if one.kind == "all-gather"]
    assert {axes_of(one, sizes) for one in gathered} == {("fsdp",)}
    widest = max(config.model.vocab_size, config.model.hidden_dim) * config.model.dim * 4
    assert max(one.bytes for one in gathered) <= widest / 2  # a device's half of one matrix
    scattered = [one for one in found if one.kind == "reduce-scatter"]
    sent = sum(one.sent(8) * one.times for one in (*gathered, *scattered))
    textbook = 3 * parameter_bytes(config) / 2 * 3 / 4
    assert 0.9 * textbook < sent <= 1.1 * textbook


def test_optimizer_state_lies_where_its_parameter_does():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = jit_programs(make_config(), mesh).init()
    places = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.trainable)}
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.trainable))
    for moment in moments:
        assert moment.sharding.spec == places[moment.shape]
    cut = [leaf for leaf in moments if leaf.addressable_shards[0].data.size < leaf.size]
    assert len(cut) >= 14  # both moments of the seven matrices of a block


def test_the_state_is_donated():
    config, mesh = make_config(), one_device()
    with jax.set_mesh(mesh):
        state, batch = begin(config, mesh), make_batch()
        compiled = step_function(config, mesh).lower(state, batch).compile()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert compiled.memory_analysis().alias_size_in_bytes >= size
        compiled(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))


@pytest.mark.parametrize("place", ["batch", "parameter"])
def test_non_finite_step_changes_nothing_and_neither_does_any_after_it(place):
    config, mesh = make_config(), one_device()
    with jax.set_mesh(mesh):
        state, step = begin(config, mesh), step_function(config, mesh)
        state, metrics = step(state, make_batch())
        assert metrics.healthy and state.healthy
        bad = make_batch(1)
        if place == "batch":
            bad.weights_BT[0, 0] = np.nan
        else:
            state.trainable.norm.scale[...] = state.trainable.norm.scale[...].at[5].set(jnp.inf)
        before = jax.device_get(state)
        state, metrics = step(state, bad)
        assert not metrics.healthy
        assert not (np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm))
        if place == "batch":
            for number in (2, 3):
                state, metrics = step(state, make_batch(number))
                assert np.isfinite(metrics.loss) and not metrics.healthy
        after = jax.device_get(state)
    assert not after.healthy
    assert_same([dataclasses.replace(before, healthy=after.healthy), after])


def test_dropout_depends_on_the_step_and_the_seed_alone():
    config, mesh = make_config(dropout=0.3), one_device()
    with jax.set_mesh(mesh):
        step, batch = step_function(config, mesh), make_batch()

        def loss(number):
            state = begin(config, mesh)
            state = dataclasses.replace(state, step=jnp.int32(number))
            return float(step(state, batch)[1].loss)

        losses = [loss(number) for number in (0, 1, 2, 0)]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_a_batch_without_any_token_is_no_division_by_zero():
    config, mesh = make_config(), one_device()
    batch = make_batch()
    batch.weights_BT[...] = 0
    with jax.set_mesh(mesh):
        _, metrics = step_function(config, mesh)(begin(config, mesh), batch)
    assert (metrics.loss, metrics.gradient_norm, metrics.healthy) == (0, 0, True)
