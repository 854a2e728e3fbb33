"""The optimizer against llama2.c's formulas and a NumPy float64 AdamW."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoints import abstract as abstract_arrays
from tiny_model import make_model

from llama_jax.checkpoints.restore import restore
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from llama_jax.distributed.mesh import make_mesh, shardings
from llama_jax.model.parameters import abstract
from llama_jax.training.optimizer import is_matrix, learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(
    steps=700, learning_rate=5e-4, min_learning_rate=3e-5, warmup_steps=90, clip_norm=0.0
)


def llama2c_rate(step, config):
    """`get_lr` of llama2.c's train.py."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if step > config.steps:
        return config.min_learning_rate
    ratio = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * ratio))
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


@pytest.mark.parametrize("changes", [{}, {"min_learning_rate": 0.0}, {"warmup_steps": 0}], ids=str)
def test_the_schedule_is_that_of_llama2c(changes):
    config = dataclasses.replace(CONFIG, **changes)
    rate = learning_rate_schedule(config)
    steps = [*range(0, 700, 23), 1, 89, 90, 91, 699, 700, 701, 9000]
    expected = [llama2c_rate(step, config) for step in steps]
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-5, atol=1e-10)
    assert rate(0) == (config.learning_rate if config.warmup_steps == 0 else 0)


def test_a_run_that_is_all_warm_up_and_a_rate_of_zero_are_fine():
    config = dataclasses.replace(CONFIG, steps=90)
    assert learning_rate_schedule(config)(45) == pytest.approx(2.5e-4)
    config = dataclasses.replace(CONFIG, learning_rate=0.0, min_learning_rate=0.0)
    assert [learning_rate_schedule(config)(step) for step in (0, 200, 900)] == [0, 0, 0]


def test_decayed_and_other_parameters_of_the_15m_are_counted_as_by_llama2c():
    shape = {"vocab_size": 32000, "dim": 288, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6}
    model = abstract(ModelConfig(**shape, context_length=256, multiple_of=32))
    mask = jax.tree.leaves(is_matrix(model))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(model)]
    assert len(mask) == len(sizes)
    assert sum(size for size, decays in zip(sizes, mask) if decays) == 15_187_968
    assert sum(size for size, decays in zip(sizes, mask) if not decays) == 3_744


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_without_a_gradient_matrices_shrink_and_norms_stay(tied):
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.3)
    model = make_model(tied_embeddings=tied)
    optimizer = make_optimizer(config)
    zero = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(model), model)
    moved = optax.apply_updates(model, updates)
    before, after = (jax.tree_util.tree_leaves_with_path(tree) for tree in (model, moved))
    norms = 0
    for (path, old), (_, new) in zip(before, after):
        is_norm = "norm" in jax.tree_util.keystr(path)
        norms += is_norm
        expected = old if is_norm else old * (1 - 5e-4 * 0.3)
        np.testing.assert_allclose(new, expected, rtol=1e-6)
        assert is_norm or (np.asarray(new) != np.asarray(old)).any()
    assert norms == 3  # two stacked ones of the blocks [L, D], one at the end


def numpy_adamw(parameters, gradients, config, decays):
    """AdamW in float64 (Loshchilov and Hutter 2019, algorithm 2), with clipping by global norm."""
    mean = {name: np.zeros_like(value) for name, value in parameters.items()}
    square = {name: np.zeros_like(value) for name, value in parameters.items()}
    for step, slopes in enumerate(gradients):
        norm = math.sqrt(sum((slope**2).sum() for slope in slopes.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        rate = llama2c_rate(step, config)
        for name, slope in slopes.items():
            slope = slope * scale
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * slope
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * slope**2
            corrected = mean[name] / (1 - config.beta1 ** (step + 1))
            root = np.sqrt(square[name] / (1 - config.beta2 ** (step + 1)))
            change = corrected / (root + config.eps)
            change += config.weight_decay * parameters[name] * (name in decays)
            parameters = parameters | {name: parameters[name] - rate * change}
    return parameters


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_steps_equal_those_of_numpy(clip_norm):
    config = dataclasses.replace(
        CONFIG, warmup_steps=2, learning_rate=1e-2, clip_norm=clip_norm, beta2=0.9
    )
    model = make_model()
    random = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(model)
    decays = {str(i) for i, decays in enumerate(jax.tree.leaves(is_matrix(model))) if decays}
    start = {str(i): np.float64(leaf) for i, leaf in enumerate(leaves)}
    gradients = [
        {name: size * random.standard_normal(value.shape) for name, value in start.items()}
        for size in (0.001, 0.2, 0.05, 1.0)  # some are clipped, some are not
    ]
    optimizer = make_optimizer(config)
    state, update = optimizer.init(model), jax.jit(optimizer.update)
    for slopes in gradients:
        tree = jax.tree.unflatten(structure, [jnp.float32(slope) for slope in slopes.values()])
        updates, state = update(tree, state, model)
        model = optax.apply_updates(model, updates)
    expected = numpy_adamw(start, gradients, config, decays)
    for leaf, value in zip(jax.tree.leaves(model), expected.values()):
        np.testing.assert_allclose(leaf, value, rtol=1e-5, atol=1e-6)


def short(**changes):
    """The optimizer with moments in bfloat16."""
    return make_optimizer(dataclasses.replace(CONFIG, moments_dtype="bfloat16", **changes))


def moments(state):
    """The two trees of moments in an optimizer's state."""
    return optax.tree.get(state, "mu"), optax.tree.get(state, "nu")


def test_short_moments_are_bfloat16_and_lie_where_long_ones_do():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model = make_model()
    states = [jax.eval_shape(make.init, model) for make in (make_optimizer(CONFIG), short())]
    long, brief = (jax.tree.leaves(shardings(state, mesh)) for state in states)
    assert long == brief
    for state, dtype in zip(states, ("float32", "bfloat16")):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(moments(state))} == {dtype}


def test_short_moments_change_nothing_but_what_is_kept():
    """From moments that bfloat16 can say, one step is that of float32, and so are its moments."""
    model = make_model()
    slopes = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), model)
    brief, long = short(), make_optimizer(CONFIG)
    update = jax.jit(brief.update)
    kept = update(slopes, brief.init(model), model)[1]
    wide = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, kept)
    updates, state = update(slopes, kept, model)
    expected, exact = jax.jit(long.update)(slopes, wide, model)
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)):
        # Two programs: the compiler may fuse other products and sums in each, up to four roundings.
        np.testing.assert_allclose(one, other, rtol=2**-21)
    for one, other in zip(*(jax.tree.leaves(moments(tree)) for tree in (state, exact))):
        np.testing.assert_allclose(np.float32(one), other, rtol=2**-7)
        assert (np.float32(one) != other).any()


@pytest.mark.slow
def test_short_moments_fade_however_slowly():
    """At beta2 = 0.999 a step changes the second moment by less than bfloat16 can say."""
    model = make_model()
    optimizer = short(beta2=0.999)
    zero = jax.tree.map(jnp.zeros_like, model)
    ones = jax.tree.map(jnp.ones_like, model)
    _, state = jax.jit(optimizer.update)(ones, optimizer.init(model), model)
    first = np.float32(moments(state)[1].embedding[...])

    def step(_, state):
        return optimizer.update(zero, state, model)[1]

    state = jax.jit(partial(jax.lax.fori_loop, 0, 300, step))(state)
    last = np.float32(moments(state)[1].embedding[...])
    assert last.mean() == pytest.approx(first.mean() * 0.999**300, rel=0.01)


@pytest.mark.slow
@pytest.mark.long
def test_short_moments_come_back_from_a_checkpoint(tmp_path):
    model = make_model()
    slopes = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), model)
    _, state = short().update(slopes, short().init(model), model)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(1, model, state, {}, 1.0)
    writer.close()
    found = restore(tmp_path / "1", {"optimizer": abstract_arrays(state)}).trees["optimizer"]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(found)):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
