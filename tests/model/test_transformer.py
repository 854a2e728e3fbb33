"""The model against the oracle, and the laws that hold between its ways of running."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from tiny_model import TINY, make_model, plain

from llama_jax.config import ModelConfig
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.model import layers
from llama_jax.model import transformer as model
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.parameters import abstract, count_parameters
from llama_jax.model.transformer import Llama, unstack
from llama_jax.training.loss import summed_nll

B, T, S, V, L = 5, 7, 12, 53, 3
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))


@jax.jit
def run(model, tokens_BT, cache=None):
    """Logits and cache; compiled once for each layout and shape."""
    return model(tokens_BT, cache)


@pytest.fixture(scope="module")
def listed(tiny_model):
    return unstack(tiny_model)


def oracle(model, tokens_BT, **numerics):
    return np.stack([reference.forward(plain(model), row, **numerics) for row in tokens_BT])


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def mean_nll(model, tokens_BT, dropout_key=None, remat="none"):
    hidden_BTD, _ = model.hidden(
        tokens_BT, dropout_key=dropout_key, execution=Execution(remat=remat)
    )
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    total = summed_nll(hidden_BTD, model.output_VD, targets_BT, jnp.ones(tokens_BT.shape))
    return total / tokens_BT.size


# The oracle.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"num_kv_heads": 6}, marks=pytest.mark.slow),
        {"num_kv_heads": 1, "tied_embeddings": False},
        {"rope_theta": 5e5, "norm_eps": 1e-2, "hidden_dim": 0, "multiple_of": 5},
    ],
)
def test_logits_agree_with_the_oracle(changes):
    model = make_model(**changes)
    numerics = {"theta": model.config.rope_theta, "eps": model.config.norm_eps}
    close(run(model, TOKENS_BT)[0], oracle(model, TOKENS_BT, **numerics))


def test_logits_by_the_cpu_kernel_agree_with_the_oracle_too(tiny_model):
    execution = Execution(attention=blockwise_attention, unroll=16)
    forward = jax.jit(lambda tokens: tiny_model(tokens, execution=execution)[0])
    close(forward(TOKENS_BT), oracle(tiny_model, TOKENS_BT))


def test_bfloat16_stays_near_the_oracle():
    model = make_model(compute_dtype="bfloat16")
    logits_BTV = run(model, TOKENS_BT)[0]
    assert logits_BTV.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    expected = oracle(model, TOKENS_BT)
    # Of the logits as a whole: one that happens to lie near zero has no relative precision.
    error = np.linalg.norm(logits_BTV - expected) / np.linalg.norm(expected)
    assert error < 2e-2


def test_the_loss_agrees_with_the_oracle(tiny_model):
    targets_BT = np.roll(TOKENS_BT, -1, axis=1)
    expected = np.mean([*map(reference.nll, oracle(tiny_model, TOKENS_BT), targets_BT)])
    close(jax.jit(mean_nll)(tiny_model, TOKENS_BT), expected)


# Cached = full.


@pytest.mark.as_used
@pytest.mark.parametrize(
    "split",
    [[3, 4], [1] * 7],
)
def test_cached_equals_full(tiny_model, listed, split):
    cache, parts, start = KVCache.empty(tiny_model.config, B, S), [], 0
    for size in split:
        logits_BTV, cache = run(listed, TOKENS_BT[:, start : start + size], cache)
        parts.append(logits_BTV)
        start += size
    assert cache.length_B.tolist() == [T] * B
    close(np.concatenate(parts, axis=1), run(tiny_model, TOKENS_BT)[0])


def test_sequences_of_different_lengths_equal_each_alone(listed):
    steps = [1, 3, 1]
    lengths = np.array([2, 7, 4, 1, 5])
    random = np.random.default_rng(2)
    sequences = [random.integers(0, V, length + sum(steps)) for length in lengths]
    prompts_BT = random.integers(0, V, (B, T))  # what follows a prompt is noise
    for row, sequence, length in zip(prompts_BT, sequences, lengths):
        row[:length] = sequence[:length]
    _, cache = run(listed, prompts_BT, KVCache.empty(listed.config, B, S))
    cache = dataclasses.replace(cache, length_B=jnp.asarray(lengths, jnp.int32))
    done = 0
    parts = []
    for size in steps:
        span = slice(done, done + size)
        new_BT = np.stack([s[n:][span] for s, n in zip(sequences, lengths)])
        logits_BTV, cache = run(listed, new_BT, cache)
        parts.append(logits_BTV)
        done += size
    together = np.concatenate(parts, axis=1)
    weights = plain(make_model())
    for got, sequence, length in zip(together, sequences, lengths):
        close(got, reference.forward(weights, sequence)[length:])


def test_a_sequence_decodes_alone_as_in_a_batch(tiny_model, listed):
    cache = KVCache.empty(tiny_model.config, 1, S)
    first, cache = run(listed, TOKENS_BT[:1, :4], cache)
    second, _ = run(listed, TOKENS_BT[:1, 4:], cache)
    close(np.concatenate([first, second], axis=1), run(tiny_model, TOKENS_BT)[0][:1])


def test_a_cache_needs_an_unstacked_model(tiny_model):
    with pytest.raises(AssertionError, match="unstack"):
        tiny_model(TOKENS_BT, KVCache.empty(tiny_model.config, B, S))


# Scanned = listed, remat = none.


def test_stacked_equals_unstacked(tiny_model, listed):
    # Listed blocks have other matrix layouts, so their sums of 24 to 40 float32 terms round
    # otherwise: the ladder's 1e-5.
    close(run(listed, TOKENS_BT)[0], run(tiny_model, TOKENS_BT)[0])
    assert len(listed.blocks) == L


@pytest.mark.slow
def test_remat_changes_neither_loss_nor_gradients():
    """With dropout; without it: `test_remat`."""
    step = jax.jit(jax.value_and_grad(mean_nll), static_argnames="remat")
    given = make_model(dropout=0.1), TOKENS_BT, jax.random.key(0)
    kept, recomputed = (jax.tree.leaves(step(*given, remat=remat)) for remat in ("none", "block"))
    for right, got in zip(kept, recomputed):
        close(got, right, 1e-6)


# Causality.


@pytest.mark.parametrize("t", [0, 3, 6])
def test_a_token_changes_no_logit_before_it(tiny_model, t):
    other_BT = TOKENS_BT.copy()
    other_BT[:, t] = (other_BT[:, t] + 1) % V
    before, after = (run(tiny_model, tokens)[0] for tokens in (TOKENS_BT, other_BT))
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(axis=(0, 2)).all()


# Dropout.


@pytest.fixture(scope="module")
def dropping():
    """A function of a key and of which sites are active; and the shapes it drops from, in order.

    It returns the hidden states of a model of one layer, and the key of each site.
    """
    small, shapes = unstack(make_model(num_layers=1, dropout=0.2)), []

    @jax.jit
    def run(key, active):
        keys = []

        def dropout(x, rate, key, *examples, **named):
            site = len(keys)
            keys.append(jax.random.key_data(key))
            shapes.append(x.shape)
            return jnp.where(active[site], layers.dropout(x, rate, key, *examples, **named), x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "dropout", dropout)
            return small.hidden(TOKENS_BT, dropout_key=key)[0], jnp.stack(keys)

    return run, shapes


def test_dropout_has_four_sites_each_with_its_own_key(dropping):
    run, shapes = dropping
    _, keys = run(jax.random.key(0), jnp.ones(4, bool))
    stream, weights = (B, T, 24), (2, B, 3, T, T)
    assert shapes == [stream, weights, stream, stream]
    assert len(np.unique(keys, axis=0)) == 4


@pytest.mark.parametrize("site", range(4))
def test_each_site_of_dropout_matters(dropping, site):
    run, _ = dropping
    one, none = (run(jax.random.key(0), jnp.arange(4) == only)[0] for only in (site, -1))
    assert np.abs(one - none).max() > 1e-3


def test_dropout_is_decided_by_its_key(dropping):
    run, _ = dropping
    once, again, other = (run(jax.random.key(n), jnp.ones(4, bool))[0] for n in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_without_a_key_nothing_is_random():
    model = make_model(dropout=0.2)
    for key, is_random in ((None, False), (jax.random.key(0), True)):
        traced = str(jax.make_jaxpr(lambda m, key=key: m.hidden(TOKENS_BT, dropout_key=key))(model))
        assert ("random_bits" in traced) == is_random


@pytest.mark.slow
def test_kernels_that_keep_their_weights_drop_the_same_residuals():
    model, key = make_model(dropout=0.3), jax.random.key(0)

    def hidden(**execution):
        return model.hidden(TOKENS_BT, dropout_key=key, execution=Execution(**execution))[0]

    expected = hidden(drops_weights=False)
    close(hidden(attention=blockwise_attention, drops_weights=False), expected)
    assert np.abs(expected - hidden()).max() > 1e-3  # the weights too
    assert np.abs(expected - model.hidden(TOKENS_BT)[0]).max() > 1e-3


def test_layers_draw_different_dropout():
    masks = []

    def attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, drop):
        masks.append(np.asarray(drop(jnp.ones((1, B, 16, 8)))).tobytes())
        return q_BTNH

    model = unstack(make_model(dropout=0.5))
    model.hidden(TOKENS_BT, dropout_key=jax.random.key(0), execution=Execution(attention=attention))
    assert len(masks) == len(set(masks)) == L


# Shapes and beginnings.


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((512, 64, 5, 8, 4, 4, 1.0, True), 260_032),
        ((32000, 288, 6, 6, 6, 32, 1.0, True), 15_191_712),
        ((32000, 512, 8, 8, 8, 32, 1.0, True), 41_689_600),
        ((32000, 768, 12, 12, 12, 32, 1.0, True), 109_529_856),
        ((32000, 4096, 32, 32, 32, 256, 1.0, False), 6_738_415_616),
        ((32000, 5120, 40, 40, 40, 256, 1.0, False), 13_015_864_320),
        ((32000, 8192, 80, 64, 8, 4096, 1.3, False), 68_976_648_192),
    ],
)
def test_real_sizes_have_their_known_number_of_parameters(sizes, count):
    names = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "multiple_of")
    names += ("ffn_dim_multiplier", "tied_embeddings")
    assert count_parameters(ModelConfig(**dict(zip(names, sizes)), context_length=64)) == count


def test_every_parameter_names_the_axes_of_its_dims(tiny_config):
    config = dataclasses.replace(tiny_config, tied_embeddings=False)
    parameters = jax.tree.leaves(abstract(config), is_leaf=lambda x: isinstance(x, nnx.Param))
    assert len(parameters) == 12
    for param in parameters:
        assert len(param.shape) - len(param.axes) in (0, 1)  # 1: the leading layers


def test_initial_matrices_have_their_deviations():
    config = ModelConfig(**TINY | {"dim": 96, "hidden_dim": 160, "tied_embeddings": False})
    model = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()
    small = 0.02 / np.sqrt(2 * L)
    weights = plain(model)
    for name, values in weights.items():
        if "norm" in name:
            np.testing.assert_array_equal(values, 1)
            continue
        std = small if name in ("wo", "down") else 0.02
        assert abs(values.std() / std - 1) < 4 / np.sqrt(2 * values.size), name
        assert abs(values.mean()) < 4 * std / np.sqrt(values.size), name
    assert (weights["wq"][0] != weights["wq"][1]).any()
    assert (weights["embedding"] != weights["output"]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_is_promoted_by_chance(dtype):
    model = make_model(compute_dtype=dtype, dropout=0.1)
    cache = KVCache.empty(model.config, B, S)
    key = jax.random.key(0)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(run, unstack(model), TOKENS_BT, cache)
        jax.eval_shape(jax.grad(lambda m: m.hidden(TOKENS_BT)[0].sum().astype("float32")), model)
        jax.eval_shape(lambda m: m.hidden(TOKENS_BT, dropout_key=key), model)
