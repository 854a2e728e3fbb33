"""The exponential against float64, and its bits in programs of many shapes."""

import jax
import numpy as np
import pytest

from llama_jax.inference.sampler import exponential

pytestmark = [pytest.mark.optimized, pytest.mark.as_used]

relative = jax.jit(lambda x: exponential((x - x.max(axis=-1, keepdims=True)) / 0.8))


def test_against_float64():
    x = -np.concatenate([np.linspace(0, 60, 200_001), np.logspace(-9, 1, 10_001)])
    x = x.astype(np.float32)
    found = np.asarray(jax.jit(exponential)(x))
    assert found.dtype == np.float32 and (found <= 1).all()
    # An ulp of x moves the result by its relative 2^-24 · |x|.
    error = np.abs(found / np.exp(x.astype(np.float64)) - 1)
    assert (error < 2.0**-22 * (1 + np.abs(x))).all()
    order = np.argsort(x)
    assert (np.diff(found[order]) >= 0).all()


def test_at_the_ends():
    x = np.asarray([0, -0.0, -1e-30, -68, -70, -1e30, -np.inf], np.float32)
    found = jax.jit(exponential)(x).tolist()
    assert found[:3] == [1, 1, 1] and found[3] > 0 and found[4:] == [0, 0, 0]


@pytest.mark.parametrize("V", [53, 256, 700, 2048, 8192])  # `jnp.exp` fails from 256 to 2048
def test_a_row_has_the_same_bits_in_any_batch(V):
    x = 4 * np.random.default_rng(V).normal(size=(17, V)).astype(np.float32)
    together = np.asarray(relative(x))
    for row in range(17):
        np.testing.assert_array_equal(relative(x[row : row + 1])[0], together[row])
