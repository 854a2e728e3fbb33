"""Matmuls of few rows with an int4 kernel on a TPU, whose integers become floats on the chip only.

XLA writes the scales of such a kernel to memory, broadcast to a float for each integer: eight times
the bytes of the kernel. This Pallas kernel reads each byte once. The scales of a group reach the
group's integers by a matmul with ones and zeros, which is exact, since they are bfloat16; what is
added to a whole group is multiplied with the sum of its inputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llama_jax.kernels.int4 import HALF, Quantized

OUTPUTS = 256  # of a tile
BYTES = 512  # of its outputs' inputs that become floats at a time
ZERO = 8  # is subtracted from integers, so that they are small and lose less when rounded
MOST_ROWS = 64  # with more, the matmul no longer waits for memory


def multiply_int4(x_RI: jax.Array, kernel: Quantized, interpret: bool = False) -> jax.Array:
    """x · kernelᵀ, float32 [R, O], of a merged int4 kernel.

    Args:
      x_RI: bfloat16, or float32, which is rounded to it.
      interpret: run on another device than a TPU.
    """
    assert kernel.minimum is not None
    (R, I), (O, P) = x_RI.shape, kernel.values.shape
    x_RBHL = jnp.pad(x_RI, ((0, 0), (0, 2 * P - I))).reshape(R, P // HALF, 2, HALF)
    low_RP, high_RP = (x_RBHL[:, :, half].reshape(R, P).astype(jnp.bfloat16) for half in (0, 1))
    groups = kernel.scale.shape[1] * HALF // P  # of the two halves of a block: 1 or 2
    scales = [kernel.scale[:, half::groups] for half in range(groups)]

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((OUTPUTS, width), lambda tile: (tile, 0))

    whole_RP = pl.BlockSpec((R, P), lambda tile: (0, 0))
    product_RO = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((R, O), jnp.float32),
        grid=(pl.cdiv(O, OUTPUTS),),
        in_specs=[whole_RP, whole_RP, rows(P), *[rows(P // HALF)] * groups],
        out_specs=pl.BlockSpec((R, OUTPUTS), lambda tile: (0, tile)),
        interpret=interpret,
    )(low_RP, high_RP, kernel.values, *scales)
    sums_RG = x_RBHL.reshape(R, kernel.scale.shape[1], -1).sum(axis=-1, dtype=jnp.float32)
    times_middle = partial(jnp.einsum, "RG,OG->RO", precision=jax.lax.Precision.HIGHEST)
    middle_OG = kernel.minimum.astype(jnp.float32) + ZERO * kernel.scale.astype(jnp.float32)
    return product_RO + times_middle(sums_RG, middle_OG)


def _kernel(low_ref, high_ref, values_ref, *refs):  # type: ignore[no-untyped-def]
    *scale_refs, out_ref = refs
    P, f32 = values_ref.shape[1], {"preferred_element_type": jnp.float32}
    out_RT = jnp.zeros(out_ref.shape, jnp.float32)
    for start in range(0, P, BYTES):
        length = min(BYTES, P - start)
        here = slice(start, start + length)
        values_TL = values_ref[:, here].astype(jnp.int32)
        blocks = (P // HALF, length)
        block_BL = jax.lax.broadcasted_iota(jnp.int32, blocks, 0)
        byte_BL = jax.lax.broadcasted_iota(jnp.int32, blocks, 1) + start
        is_of_BL = (block_BL == byte_BL // HALF).astype(jnp.bfloat16)
        scales_TL = [jnp.dot(scale_ref[...], is_of_BL, **f32) for scale_ref in scale_refs]
        for x_ref, integers_TL, scale_TL in (
            (low_ref, values_TL & 15, scales_TL[0]),
            (high_ref, values_TL >> 4, scales_TL[-1]),
        ):
            floats_TL = ((integers_TL - ZERO).astype(jnp.float32) * scale_TL).astype(jnp.bfloat16)
            last = (((1,), (1,)), ((), ()))
            out_RT += jax.lax.dot_general(x_ref[:, here], floats_TL, last, **f32)
    out_ref[...] = out_RT
