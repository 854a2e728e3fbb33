"""Rounding at random: to a neighbour, right on average, each element for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.training.optimizer import round_stochastically

MANY = 2**16


@pytest.mark.parametrize("value", [1.001, -0.3, 3.1e-5, 7e30, 1 + 2**-8 + 2**-15])
def test_it_is_a_neighbour_and_on_average_the_number_itself(value):
    rounded = round_stochastically(jnp.full(MANY, value, jnp.float32), jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    found = np.float64(rounded)
    low, high = found.min(), found.max()
    assert low < np.float32(value) < high
    assert set(found) == {low, high}
    assert high - low <= abs(value) * 2**-7  # a unit in the last of 8 bits
    deviation = (high - low) / 2 / np.sqrt(MANY)
    assert abs(found.mean() - np.float32(value)) < 4 * deviation


def test_what_bfloat16_can_say_stays():
    exact = jnp.arange(-128.0, 129.0) * 2.0**-3
    for seed in range(5):
        rounded = round_stochastically(exact.reshape(257, 1), jax.random.key(seed))
        np.testing.assert_array_equal(np.float32(rounded)[:, 0], exact)


def test_elements_and_keys_decide_independently():
    """Agreement of two fair coins is a fair coin, whatever they are tossed for."""
    halfway = jnp.full((64, 32, 32), 1 + 2**-8, jnp.float32)
    up = [np.asarray(round_stochastically(halfway, jax.random.key(n)) > 1) for n in (0, 1, 0)]
    np.testing.assert_array_equal(up[0], up[2])
    pairs = [(up[0], up[1])]
    pairs += [(up[0], np.roll(up[0], step, axis)) for step in (1, 2, 8) for axis in range(3)]
    for one, other in pairs:
        assert abs(np.mean(one == other) - 0.5) < 4 * 0.5 / np.sqrt(MANY)
