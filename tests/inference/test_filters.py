"""Token filters against distributions worked by hand and against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.inference.sampler import TOTAL, keep_min_p, keep_top_k, keep_top_p, masses

HAND = np.asarray([0.0, 1.0, 0.8, 0.2], np.float32)  # probabilities of 0, .5, .4, .1

# A value for each row, or one for all.
top_k, top_p, min_p = (
    jax.jit(
        lambda *arrays, keep=keep: keep(*arrays[:-1], jnp.broadcast_to(arrays[-1], len(arrays[0])))
    )
    for keep in (keep_top_k, keep_top_p, keep_min_p)
)


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
def test_top_k_by_hand(k, kept):
    assert np.flatnonzero(top_k(HAND[None], k)[0]).tolist() == kept


@pytest.mark.parametrize(
    ("p", "kept"),
    [(1e-9, [1]), (0.49, [1]), (0.51, [1, 2]), (0.89, [1, 2]), (0.91, [1, 2, 3]), (1.0, [1, 2, 3])],
)
def test_top_p_by_hand(p, kept):
    assert np.flatnonzero(top_p(masses(HAND[None]), p)[0]).tolist() == kept


def test_top_p_stops_at_a_sum_of_exactly_p():
    halves = np.asarray([[50, 200, 100, 50]], np.float32)
    assert top_p(halves, 0.5).tolist() == [[0, 200, 0, 0]]
    assert top_p(halves, 0.75).tolist() == [[0, 200, 100, 0]]


@pytest.mark.parametrize(
    ("p", "kept"), [(1.0, [1]), (0.81, [1]), (0.79, [1, 2]), (0.2, [1, 2, 3]), (0.1, [1, 2, 3])]
)
def test_min_p_by_hand(p, kept):
    found = min_p(masses(HAND[None]), HAND[None], np.float32(p))[0]
    assert np.flatnonzero(found).tolist() == kept
    np.testing.assert_array_equal(found[np.asarray(kept)], masses(HAND[None])[0, np.asarray(kept)])


def test_equally_likely_tokens_are_kept_together():
    weights = np.asarray([[1, 0.5, 1, 0.5]], np.float32)
    assert top_k(weights, 1).tolist() == [[1, 0, 1, 0]]
    assert top_k(weights, 3).tolist() == weights.tolist()
    assert top_p(8 * weights, 0.3).tolist() == [[8, 0, 8, 0]]
    assert min_p(8 * weights, weights, 0.6).tolist() == [[8, 0, 8, 0]]


def test_top_k_distinguishes_neighbouring_floats():
    flat = np.full((1, 32_000), np.nextafter(np.float32(1), np.float32(0)))
    flat[0, 17] = 1
    assert np.flatnonzero(top_k(flat, 1)[0]).tolist() == [17]


@pytest.mark.parametrize("V", [53, 300, 32000])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(1e-6, 1), top=st.integers(0, 52))
def test_thresholds_equal_those_of_sorting(V, seed, share, top):
    random = np.random.default_rng(seed)
    weights_V = (random.integers(0, 257, V) ** 2 // 256 / 256).astype(np.float32)  # many ties
    weights_V[top] = 1
    falling = -np.sort(-weights_V)
    k = 1 + int(share * ((weights_V > 0).sum() - 1))
    expected = np.where(weights_V >= falling[k - 1], weights_V, 0)
    np.testing.assert_array_equal(top_k(weights_V[None], k)[0], expected)

    masses_V = np.round(weights_V * (TOTAL / weights_V.sum(dtype=np.float64))).astype(np.float32)
    falling = -np.sort(-masses_V)
    sums, share = np.cumsum(falling, dtype=np.float64), np.float32(share)
    target = np.ceil(share * np.float32(sums[-1]))
    # Meta's rule: the token whose mass crosses the target is kept, and those after it are not.
    crossing = falling[np.searchsorted(sums, target)]
    expected = np.where(masses_V >= crossing, masses_V, 0)
    np.testing.assert_array_equal(top_p(masses_V[None], share)[0], expected)


def test_neutral_values_keep_every_bit():
    weights_BV = np.random.default_rng(1).random((3, 53), np.float32)
    weights_BV[:, 7], weights_BV[:, 9] = 1, 0
    masses_BV = masses(weights_BV)
    np.testing.assert_array_equal(top_k(weights_BV, 2**31 - 1), weights_BV)
    np.testing.assert_array_equal(top_p(masses_BV, 1.0), masses_BV)
    np.testing.assert_array_equal(min_p(masses_BV, weights_BV, 0.0), masses_BV)


def test_rows_have_their_own_thresholds_and_values():
    weights_BV = np.random.default_rng(1).random((7, 53), np.float32) ** np.arange(1, 8)[:, None]
    weights_BV = (weights_BV / weights_BV.max(axis=-1, keepdims=True)).astype(np.float32)
    masses_BV = np.asarray(masses(weights_BV))
    values = np.asarray([0.6, 0.6, 0.6, 0.6, 0.6, 0.3, 0.99], np.float32)
    together = np.asarray(top_p(masses_BV, values))
    for row, value, kept in zip(masses_BV, values, together):
        np.testing.assert_array_equal(top_p(row[None], value)[0], kept)
    assert len({int((kept > 0).sum()) for kept in together}) > 3
