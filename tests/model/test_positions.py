"""Rotary positions against the oracle, and the laws that make them positions."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from llama_jax.config import RopeScaling
from llama_jax.model.positions import frequencies, rotary_embedding, rotate

THETA = 500.0
X_BTNH = np.random.default_rng(0).standard_normal((5, 7, 6, 4), np.float32)


def turned(x, positions_BT):
    turn = rotary_embedding(jnp.asarray(positions_BT), x.shape[-1], THETA, RopeScaling())
    return rotate(jnp.asarray(x), *turn)


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


def test_linear_scaling_stretches_every_wavelength():
    plain = frequencies(8, THETA, RopeScaling())
    np.testing.assert_allclose(plain, THETA ** -(np.arange(4) / 4), rtol=1e-6)
    stretched = frequencies(8, THETA, RopeScaling(kind="linear", factor=2.5))
    np.testing.assert_allclose(stretched, plain / 2.5, rtol=1e-6)


def test_llama3_scaling_stretches_long_wavelengths_alone():
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    plain, stretched = (frequencies(128, 5e5, which) for which in (RopeScaling(), scaling))
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(stretched[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(stretched[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    share = (turns[between] - 1) / 3
    blended = plain[between] * (share + (1 - share) / 8)
    assert between.sum() > 2
    np.testing.assert_allclose(stretched[between], blended, rtol=1e-6)
