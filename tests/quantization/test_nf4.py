"""NF4 against bitsandbytes' algorithm in NumPy: codes, floats, doubly quantized scales."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels.int4 import NORMAL_FLOATS
from llama_jax.quantization.rounding import to_nf4

FLOAT32 = jnp.dtype(jnp.float32)
LEVELS = np.asarray(NORMAL_FLOATS)


def drawn(outputs=9, inputs=192):
    return np.random.default_rng(0).standard_normal((outputs, inputs)).astype(np.float32)


def blockwise(w_OI):
    """Codes [O, I] and largest |w| [O, I / 64] of bitsandbytes' blockwise quantization."""
    w_OGI = w_OI.astype(np.float64).reshape(len(w_OI), -1, 64)
    largest_OG = np.abs(w_OGI).max(axis=-1)
    unit_OGI = w_OGI / np.where(largest_OG == 0, 1, largest_OG)[:, :, None]
    midpoints = (LEVELS[1:] + LEVELS[:-1]) / 2
    codes_OGI = np.searchsorted(midpoints, unit_OGI, side="left")
    distance = np.abs(unit_OGI[..., None] - midpoints).min(axis=-1)
    return codes_OGI.reshape(w_OI.shape), largest_OG, (distance < 1e-6).reshape(w_OI.shape)


def codes_of(kernel):
    """Codes [O, I] of the packed bytes."""
    bytes_ = np.asarray(kernel.values).reshape(len(kernel.values), -1, 32)
    return np.stack([bytes_ & 15, bytes_ >> 4], axis=2).reshape(len(bytes_), -1)


def test_the_levels_are_quantiles_of_the_normal_distribution():
    from statistics import NormalDist  # bitsandbytes' create_normal_map, offset 0.9677083

    inverse, offset = NormalDist().inv_cdf, 0.9677083
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0, *below])
    np.testing.assert_allclose(levels / levels.max(), LEVELS, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_codes_and_floats_are_those_of_bitsandbytes(scale):
    w_OI = drawn() * np.float32(scale)
    w_OI[2, :64] = 0.0
    found, (codes, largest, is_tie) = to_nf4(jnp.asarray(w_OI)), blockwise(w_OI)
    np.testing.assert_array_equal(np.where(is_tie, 0, codes_of(found)), np.where(is_tie, 0, codes))
    np.testing.assert_array_equal(found.scale, largest.astype(np.float32))
    floats = LEVELS[codes] * np.repeat(largest, 64, axis=1)
    deviation = np.abs(found.dequantize(192, FLOAT32) - floats)
    assert np.where(is_tie, 0, deviation).max() <= 1e-7 * np.abs(floats).max()
    assert (found.dequantize(192, FLOAT32)[2, :64] == 0).all()


def test_inputs_that_fill_no_block():
    w_OI = drawn(inputs=100)
    padded = np.pad(w_OI, ((0, 0), (0, 28)))
    np.testing.assert_array_equal(
        to_nf4(jnp.asarray(w_OI)).dequantize(100, FLOAT32),
        to_nf4(jnp.asarray(padded)).dequantize(128, FLOAT32)[:, :100],
    )


def test_scales_in_eight_bits():
    w_OI = drawn(7, 64 * 40) * np.exp(np.arange(7, dtype=np.float32))[:, None]
    w_OI[3] = 0.0
    plain, double = (to_nf4(jnp.asarray(w_OI), flag) for flag in (False, True))
    np.testing.assert_array_equal(double.values, plain.values)
    assert double.scale.dtype == np.uint8
    spread_O = np.ptp(plain.scale, axis=1)
    error_O = np.abs(double.scales - plain.scale).max(axis=1)
    assert (error_O <= spread_O / 510 * 1.001).all() and error_O[0] > 0
    exact, near = (each.dequantize(64 * 40, FLOAT32) for each in (plain, double))
    assert np.abs(near - exact).max() < 0.01 * np.abs(exact).max()


def test_normal_weights_are_closer_than_equally_spaced_levels():
    w_OI = drawn(64, 256)
    found = np.asarray(to_nf4(jnp.asarray(w_OI)).dequantize(256, FLOAT32))
    groups = w_OI.reshape(64, -1, 64)
    step = np.abs(groups).max(axis=-1, keepdims=True) / 7
    spaced = (np.round(groups / step) * step).reshape(w_OI.shape)
    assert np.linalg.norm(found - w_OI) < 0.9 * np.linalg.norm(spaced - w_OI)
