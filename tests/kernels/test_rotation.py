"""The rotation of heads: both ways give the same bits, and so do their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import RopeScaling
from llama_jax.kernels.rotation import by_halves, by_matmul
from llama_jax.model.positions import rotary_embedding

B, T, N, H = 2, 7, 3, 10


@pytest.fixture(scope="module")
def angles():
    positions_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) * 5
    return rotary_embedding(positions_BT, H, 1e4, RopeScaling())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_matmul_that_swaps_halves_changes_not_a_bit(angles, dtype):
    x_BTNH, weights_BTNH = jax.random.normal(jax.random.key(0), (2, B, T, N, H)).astype(dtype)

    def rotated_and_gradient(rotate):
        return jax.vjp(lambda x: rotate(x, *angles), x_BTNH)[1](weights_BTNH)[0], rotate(
            x_BTNH, *angles
        )

    for one, other in zip(*map(rotated_and_gradient, (by_halves, by_matmul)), strict=True):
        assert one.dtype == other.dtype == dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
