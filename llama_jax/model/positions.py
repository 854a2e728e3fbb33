"""Rotary position embedding (Su et al. 2021, RoFormer).

Inside this package the two members of a rotated pair lie in the two *halves* of a head, so the
rotation needs no strided access. Formats that interleave them are permuted in `formats`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each of the H/2 pairs, float32 [H/2].

    `scaling` of kind "linear" divides them all (Chen et al. 2023, position interpolation); "llama3"
    divides those of long wavelengths only (Llama 3.1's `apply_scaling`).
    """
    plain = np.float32(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling.kind == "none":
        return plain
    scaled = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return scaled
    rotations = scaling.original_context * plain / (2 * math.pi)  # over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return kept * plain + (1 - kept) * scaled


def rotary_embedding(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, 1, H/2], of the angle of each pair at each position."""
    frequencies_H = frequencies(head_dim, theta, scaling)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies_H[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """`x` with each pair (h, h + H/2) rotated by its angle, in float32 and cast back."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def positions_within(segments_BT: jax.Array) -> jax.Array:
    """Positions [B, T] counted from the start of each segment; a segment is a run of equal ids."""
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = jax.lax.cummax(jnp.where(begins_BT, index_T[None], 0), axis=1)
    return index_T[None] - starts_BT
