"""Rotary positions against the oracle, and the laws that make them positions."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from llama_jax.config import RopeScaling
from llama_jax.kernels.rotation import rotate
from llama_jax.model.positions import attention_factor, frequencies, rotary_embedding

THETA = 500.0
X_BTNH = np.random.default_rng(0).standard_normal((5, 7, 6, 4), np.float32)


def rotated(x, positions_BT):
    rotary = rotary_embedding(jnp.asarray(positions_BT), x.shape[-1], THETA, RopeScaling())
    return rotate(jnp.asarray(x), *rotary)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_each_sequence_is_rotated_by_its_own_positions(dtype, tolerance):
    positions_BT = np.arange(5)[:, None] * 11 + np.arange(7)
    x_BTNH = jnp.asarray(X_BTNH, dtype)
    out = rotated(x_BTNH, positions_BT)
    assert out.dtype == dtype
    for b, t, n in np.ndindex(5, 7, 6):
        expected = reference.rope(np.asarray(x_BTNH[b, t, n]), positions_BT[b, t], THETA)
        got = np.asarray(out[b, t, n], np.float64)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_one_row_of_positions_serves_the_batch():
    row_1T = np.arange(7)[None]
    np.testing.assert_array_equal(rotated(X_BTNH, row_1T), rotated(X_BTNH, row_1T.repeat(5, 0)))


def test_position_zero_is_not_rotated():
    np.testing.assert_array_equal(rotated(X_BTNH, np.zeros((5, 7), int)), X_BTNH)


def test_rotation_keeps_lengths():
    out = rotated(X_BTNH, np.arange(35).reshape(5, 7))
    lengths = [np.linalg.norm(x, axis=-1) for x in (out, X_BTNH)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_scores_depend_on_distance_only():
    q, k = X_BTNH[:1, :1], X_BTNH[1:2, :1]
    near = np.sum(rotated(q, [[9]]) * rotated(k, [[4]]), -1)
    far = np.sum(rotated(q, [[25]]) * rotated(k, [[20]]), -1)
    other = np.sum(rotated(q, [[25]]) * rotated(k, [[21]]), -1)
    np.testing.assert_allclose(near, far, rtol=1e-5, atol=1e-5)
    assert np.abs(near - other).max() > 0.1


def test_linear_scaling_multiplies_every_wavelength():
    plain = frequencies(8, THETA, RopeScaling())
    np.testing.assert_allclose(plain, THETA ** -(np.arange(4) / 4), rtol=1e-6)
    scaled = frequencies(8, THETA, RopeScaling(kind="linear", factor=2.5))
    np.testing.assert_allclose(scaled, plain / 2.5, rtol=1e-6)


def test_llama3_scaling_multiplies_long_wavelengths_only():
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0
    )
    plain, scaled = (frequencies(128, 5e5, which) for which in (RopeScaling(), scaling))
    rotations = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[rotations > 4], plain[rotations > 4])
    np.testing.assert_allclose(scaled[rotations < 1], plain[rotations < 1] / 8, rtol=1e-6)
    between = (rotations > 1) & (rotations < 4)
    share = (rotations[between] - 1) / 3
    blended = plain[between] * (share + (1 - share) / 8)
    assert between.sum() > 2
    np.testing.assert_allclose(scaled[between], blended, rtol=1e-6)


def test_yarn_scales_long_wavelengths_only_and_sharpens_attention():
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context=4096, truncate=False)
    plain, scaled = (frequencies(128, 1e4, which) for which in (RopeScaling(), scaling))
    rotations = 4096 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[rotations > 32], plain[rotations > 32])
    np.testing.assert_allclose(scaled[rotations < 1], plain[rotations < 1] / 4, rtol=1e-6)
    # Between them a pair is blended by its index, which is linear in the logarithm of rotations.
    between = (rotations > 1) & (rotations < 32)
    kept = np.log(rotations[between]) / np.log(32)
    assert between.sum() > 2
    blended = plain[between] * (kept + (1 - kept) / 4)
    np.testing.assert_allclose(scaled[between], blended, rtol=1e-5)
    factor = 0.1 * np.log(4.0) + 1
    assert attention_factor(scaling) == pytest.approx(factor)
    cosine, sine = rotary_embedding(jnp.arange(3)[None], 128, 1e4, scaling)
    np.testing.assert_allclose(cosine**2 + sine**2, factor**2, rtol=1e-5)


@pytest.mark.parametrize("length", [5, 9, 20])
def test_dynamic_scaling_raises_the_base_with_the_length(length):
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context=9)
    ratio = max(2.0 * length / 9 - 1.0, 1.0)
    base = THETA * ratio ** (8 / 6)
    angles = np.arange(length)[:, None] * base ** -(np.arange(4) / 4)
    cosine, sine = rotary_embedding(jnp.arange(length)[None], 8, THETA, scaling)
    np.testing.assert_allclose(cosine[0, :, 0], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sine[0, :, 0], np.sin(angles), atol=1e-5)
