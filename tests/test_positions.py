"""Rotary positions against the oracle, and the laws that make them positions."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from llama_jax.positions import rotate, rotation

THETA = 500.0
X_BTNH = np.random.default_rng(0).standard_normal((5, 7, 6, 4), np.float32)


def turned(x, positions_BT):
    return rotate(jnp.asarray(x), *rotation(jnp.asarray(positions_BT), x.shape[-1], THETA))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_each_row_turns_by_its_own_positions(dtype, tolerance):
    positions_BT = np.arange(5)[:, None] * 11 + np.arange(7)
    x_BTNH = jnp.asarray(X_BTNH, dtype)
    out = turned(x_BTNH, positions_BT)
    assert out.dtype == dtype
    for b, t, n in np.ndindex(5, 7, 6):
        expected = reference.rope(np.asarray(x_BTNH[b, t, n]), positions_BT[b, t], THETA)
        got = np.asarray(out[b, t, n], np.float64)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_one_row_of_positions_serves_the_batch():
    row_1T = np.arange(7)[None]
    np.testing.assert_array_equal(turned(X_BTNH, row_1T), turned(X_BTNH, row_1T.repeat(5, 0)))


def test_position_zero_turns_nothing():
    np.testing.assert_array_equal(turned(X_BTNH, np.zeros((5, 7), int)), X_BTNH)


def test_turning_keeps_lengths():
    out = turned(X_BTNH, np.arange(35).reshape(5, 7))
    lengths = [np.linalg.norm(x, axis=-1) for x in (out, X_BTNH)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_scores_depend_on_distance_only():
    q, k = X_BTNH[:1, :1], X_BTNH[1:2, :1]
    near = np.sum(turned(q, [[9]]) * turned(k, [[4]]), -1)
    far = np.sum(turned(q, [[25]]) * turned(k, [[20]]), -1)
    other = np.sum(turned(q, [[25]]) * turned(k, [[21]]), -1)
    np.testing.assert_allclose(near, far, rtol=1e-5, atol=1e-5)
    assert np.abs(near - other).max() > 0.1
