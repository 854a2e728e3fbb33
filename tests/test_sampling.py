"""Samplers against distributions worked by hand, against sorting, and against chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from llama_jax.errors import UsageError
from llama_jax.sampling import draw, keep_most, make_sampler

HAND = np.log(np.maximum([0.0, 0.5, 0.4, 0.1], 1e-300)).astype(np.float32)
HAND[0] = -np.inf
sample = jax.jit(lambda sampler, logits_BV, keys_B: sampler(logits_BV, keys_B))
keep_mass = jax.jit(lambda weights_BV, mass: keep_most(weights_BV, lambda kept: kept, mass))
keep_count = jax.jit(lambda weights_BV, k: keep_most(weights_BV, lambda kept: kept > 0, k))


def probabilities(logits, **settings):
    """What a sampler makes of one row of logits."""
    weights = np.asarray(make_sampler(**settings).weights(jnp.asarray(logits, jnp.float32)[None]))
    return weights[0] / weights.sum()


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("settings", "expected"),
    {
        "nothing": ({}, [0, 0.5, 0.4, 0.1]),
        "top_p": ({"top_p": 0.6}, [0, 5 / 9, 4 / 9, 0]),
        "top_p of the first": ({"top_p": 0.49}, [0, 1, 0, 0]),
        "top_p near 0": ({"top_p": 1e-9}, [0, 1, 0, 0]),
        "top_p near 1": ({"top_p": 0.95}, [0, 0.5, 0.4, 0.1]),
        "top_k 1": ({"top_k": 1}, [0, 1, 0, 0]),
        "top_k 2": ({"top_k": 2}, [0, 5 / 9, 4 / 9, 0]),
        "top_k of all": ({"top_k": 4}, [0, 0.5, 0.4, 0.1]),
        "top_k beyond all": ({"top_k": 2**40}, [0, 0.5, 0.4, 0.1]),
        "cold": ({"temperature": 0.5}, [0, 25 / 42, 16 / 42, 1 / 42]),
        "hot": ({"temperature": 1e9}, [0, 1 / 3, 1 / 3, 1 / 3]),
        "near absolute zero": ({"temperature": 1e-37}, [0, 1, 0, 0]),
        # .25 : .16 : .01 is .595 : .381 : .024, so the first alone reaches .55; were
        # top-p to come before temperature, it would not
        "temperature, then top_p": ({"temperature": 0.5, "top_p": 0.55}, [0, 1, 0, 0]),
        # of all, .5 does not reach .52; of the two that top-k leaves it is 5/9 and does
        "top_k, then top_p": ({"top_k": 2, "top_p": 0.52}, [0, 1, 0, 0]),
        "top_p alone keeps two": ({"top_p": 0.52}, [0, 5 / 9, 4 / 9, 0]),
    }.values(),
)
def test_distributions_worked_by_hand(settings, expected):
    np.testing.assert_allclose(probabilities(HAND, **settings), expected, atol=1e-6)


def test_equally_likely_tokens_are_kept_together():
    logits = np.log([0.3, 0.2, 0.3, 0.2])
    np.testing.assert_allclose(probabilities(logits, top_k=1), [0.5, 0, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(logits, top_p=0.4), [0.5, 0, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(logits, top_k=3), [0.3, 0.2, 0.3, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-6}]
)
def test_the_likeliest_token_is_chosen(settings):
    logits_BV = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    tokens_B = sample(make_sampler(**settings), logits_BV, keys(64))
    assert tokens_B.dtype == jnp.int32
    np.testing.assert_array_equal(tokens_B, logits_BV.argmax(axis=-1))


def test_temperature_0_does_not_divide():
    with jax.debug_nans(True), jax.debug_infs(True):
        assert make_sampler(temperature=0)(jnp.asarray([[1.0, 3.0, 2.0]]), keys(1)).tolist() == [1]
    text = str(jax.make_jaxpr(make_sampler(temperature=0))(jnp.ones((2, 5)), keys(2)))
    assert "argmax" in text and " div " not in text and " exp " not in text


def masses(V):
    """Weights whose sums float32 holds exactly, with many ties, the largest of them 1."""
    counts = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))
    return counts.map(lambda random: (random.integers(0, 257, V) ** 2 // 256).clip(0, 255) / 256)


@pytest.mark.parametrize("V", [53, 300, 32000])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_thresholds_are_those_found_by_sorting(V, data):
    weights_V = data.draw(masses(V)).astype(np.float32)
    weights_V[data.draw(st.integers(0, V - 1))] = 1
    target = np.float32(data.draw(st.floats(1e-6, 1))) * weights_V.sum(dtype=np.float32)
    falling = np.sort(weights_V)[::-1]
    # Meta's rule: the token whose mass crosses the target is kept, and those after it are not.
    crossing = falling[np.searchsorted(np.cumsum(falling, dtype=np.float64), target)]
    expected = np.where(weights_V >= crossing, weights_V, 0)
    np.testing.assert_array_equal(keep_mass(weights_V[None], target)[0], expected)

    k = data.draw(st.integers(1, int((weights_V > 0).sum())))
    expected = np.where(weights_V >= falling[k - 1], weights_V, 0)
    np.testing.assert_array_equal(keep_count(weights_V[None], k)[0], expected)


def test_rows_have_thresholds_of_their_own():
    weights_BV = np.random.default_rng(1).random((7, 53), np.float32)
    together = keep_mass(weights_BV, 0.6 * weights_BV.sum(axis=-1))
    for row, kept in zip(weights_BV, together):
        np.testing.assert_array_equal(keep_mass(row[None], 0.6 * row.sum(keepdims=True))[0], kept)
    assert len({int((kept > 0).sum()) for kept in together}) > 1


@pytest.mark.parametrize("V", [53, 256, 700])
def test_tokens_are_as_frequent_as_they_are_likely(V):
    random = np.random.default_rng(V)
    weights_V = random.random(V) * (random.random(V) < 0.7)
    rows = np.broadcast_to(weights_V.astype(np.float32), (10_000, V))
    drawn = [jax.jit(draw)(rows, keys(10_000, seed)) for seed in range(10)]
    seen = np.bincount(np.concatenate(drawn), minlength=V)
    possible = weights_V > 0
    assert seen.sum() == 100_000 and not seen[~possible].any()
    expected = 100_000 * weights_V[possible] / weights_V.sum()
    assert chisquare(seen[possible], expected).pvalue > 1e-3


def test_a_draw_never_lands_on_a_weight_of_zero():
    weights_BV = np.zeros((5000, 515), np.float32)
    weights_BV[:, [255, 256, 514]] = [1e-30, 1, 1e-30]  # at the ends of blocks
    tokens = np.asarray(jax.jit(draw)(weights_BV, keys(5000)))
    assert set(tokens.tolist()) <= {255, 256, 514}
    assert (tokens == 256).mean() > 0.99


def test_a_row_depends_on_its_logits_and_key_only():
    sampler = make_sampler(temperature=0.8, top_k=40, top_p=0.9)
    logits_BV = 2 * np.random.default_rng(2).normal(size=(12, 700)).astype(np.float32)
    row_keys = keys(12)
    together = sample(sampler, logits_BV, row_keys)
    assert len(set(together.tolist())) > 6
    np.testing.assert_array_equal(sample(sampler, logits_BV[::-1], row_keys[::-1]), together[::-1])
    for row in range(4):
        alone = sample(sampler, logits_BV[row : row + 1], row_keys[row : row + 1])
        assert alone.tolist() == [together[row]]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("temperature", value, "0 (greedy) or more") for value in (-1, -1e-9, np.nan, np.inf)]
    + [("top_k", value, "0 (off) or more") for value in (-1, -(2**40))]
    + [("top_p", value, "more than 0, up to 1") for value in (0, -0.5, 1.0001, 2, np.nan, np.inf)],
)
def test_an_argument_out_of_range_is_named(name, value, expected):
    with pytest.raises(UsageError) as error:
        make_sampler(**{name: value})
    assert str(error.value).startswith(f"{name}={value} is out of range")
    assert expected in str(error.value)
