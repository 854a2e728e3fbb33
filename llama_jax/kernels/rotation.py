"""The rotation of rotary embeddings: pairs (h, h + H/2) of a head, each by its angle.

`by_halves` is its definition. On a TPU halves of a head of 128 fill half of the lanes, and XLA
writes them to memory one by one: predicted by its compiler to take a quarter of a block's forward
pass. There, in bfloat16, `by_matmul` has the matrix unit swap the halves: it multiplies by a matrix
of zeros and ones, which is exact, and XLA fuses the rest into that matmul.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels.matmul import platform


def rotate(x_BTNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """`x` with each pair (h, h + H/2) rotated by its angle, in float32 and cast back.

    Args:
      cosine, sine: of the angles, float32 [B, T, 1, H/2]; they have no gradients.
    """
    is_large = x_BTNH.shape[1] > 1  # not the one token of a step of decoding
    swaps = is_large and x_BTNH.dtype == jnp.bfloat16 and platform() == "tpu"
    return (by_matmul if swaps else by_halves)(x_BTNH, cosine, sine)


def by_halves(x_BTNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """The rotation of each half by the other."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


@jax.custom_vjp
def by_matmul(x_BTNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """The rotation of whole heads, whose halves a matmul swaps."""
    H = x_BTNH.shape[-1]
    swap_HH = np.roll(np.eye(H), H // 2, axis=0)
    swapped_BTNH = jnp.einsum(
        "BTNH,HG->BTNG",
        x_BTNH,
        swap_HH.astype(x_BTNH.dtype),
        precision=jax.lax.Precision.HIGHEST,  # exact for float32, too
        preferred_element_type=jnp.float32,
    )
    cosine, sine = (
        jnp.concatenate(halves, axis=-1) for halves in ((cosine, cosine), (-sine, sine))
    )
    rotated_BTNH = x_BTNH.astype(jnp.float32) * cosine + swapped_BTNH * sine
    return rotated_BTNH.astype(x_BTNH.dtype)


def _forward(x_BTNH: jax.Array, cosine: jax.Array, sine: jax.Array) -> tuple[jax.Array, Any]:
    return by_matmul(x_BTNH, cosine, sine), (cosine, sine)


def _backward(angles: tuple[jax.Array, jax.Array], gradient_BTNH: jax.Array) -> tuple[Any, ...]:
    """The gradient, rotated back; that of a matmul would be rounded before it is added."""
    cosine, sine = angles
    return by_matmul(gradient_BTNH, cosine, -sine), None, None


by_matmul.defvjp(_forward, _backward)
