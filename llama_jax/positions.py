"""Rotary position embedding (Su et al. 2021, RoFormer).

Inside this package the two members of a rotated pair lie in the two *halves* of a head, so the
rotation needs no strided access. Formats that interleave them are permuted in `formats`.
"""

import jax
import jax.numpy as jnp


def rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, 1, H/2], of the angle of each pair at each position."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """`x` with each pair (h, h + H/2) turned by its angle, in float32 and cast back."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
