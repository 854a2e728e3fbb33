"""Causal self-attention on TPU by JAX's splash kernel (sparse flash attention, in Pallas).

Scores live in the chip's fast memory alone, and blocks above the diagonal are never computed.
Packed documents are passed to the kernel as segment ids.
"""

import math

import jax
import jax.numpy as jnp

from llama_jax.kernels.blockwise import KEPT

LANES = 128  # of the vector unit; a block of the kernel is a multiple
LARGEST_BLOCK = 512  # positions; two blocks of scores in float32 then fit beside their operands
# Of keys in the backward pass, which adds up a gradient of the queries for each block of keys: the
# fewer, the less is written, and the more scores above the diagonal are computed.
LARGEST_KEY_BLOCK = 1024


def block_length(T: int) -> int:
    """Positions per block: the fewest blocks, then the least padding."""
    blocks = -(-T // LARGEST_BLOCK)
    return -(-T // (blocks * LANES)) * LANES


def key_block_length(T: int, block: int) -> int:
    """Keys per block of the backward pass: as many blocks of `block` as divide T evenly."""
    blocks = T // block
    most = max(1, LARGEST_KEY_BLOCK // block)
    return block * next(count for count in range(min(most, blocks), 0, -1) if blocks % count == 0)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Causal softmax attention [B, T, N, H] of T queries over the same T positions.

    Args:
      q_BTNH: queries; the result has their dtype.
      k_BTKH: keys, K dividing N.
      v_BTKH: values.
      segments_BT: int32, the index of each position's document; None: one document.
      window: newest positions that a query attends to; 0: all.
      interpret: interpret the kernel on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    T = q_BTNH.shape[1]
    ids = None
    if segments_BT is not None:
        padded_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % block_length(T))))
        ids = SegmentIds(padded_BT, padded_BT)
    return _attend(q_BTNH, k_BTKH, v_BTKH, ids, window, interpret)


def splash_with_log_sums(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`splash_attention`, and the log of each softmax's denominator, float32 [B, T, N, 1].

    It has no gradient.
    """
    out_BTNH, (log_sum_BTN,) = _attend(
        q_BTNH, k_BTKH, v_BTKH, None, window, interpret, save_residuals=True
    )
    return out_BTNH, log_sum_BTN[..., None]


def _attend(  # type: ignore[no-untyped-def]
    q_BTNH, k_BTKH, v_BTKH, ids, window, interpret, save_residuals=False
):
    """What the kernel returns, with heads after positions."""
    T, N, H = q_BTNH.shape[1:]
    block = block_length(T)
    scaled_BTNH = q_BTNH * (1.0 / math.sqrt(H))  # the kernel does not scale
    # Padding comes last, so no query attends to it.
    padding = -T % block
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (scaled_BTNH, k_BTKH, v_BTKH)
    )
    found = jax.vmap(_kernel(T + padding, N, block, window, interpret, save_residuals))(
        q, k, v, ids
    )
    return jax.tree.map(lambda x_BNT: x_BNT.swapaxes(1, 2)[:, :T], found)


def _kernel(  # type: ignore[no-untyped-def]
    T: int, N: int, block: int, window: int, interpret: bool, save_residuals: bool
):
    """The kernel of one sequence: ([N, T, H], [K, T, H], [K, T, H], segment ids) → [N, T, H]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    keys = key_block_length(T, block)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=block,
        # One backward kernel in place of two: five matmuls of a block instead of seven, and its
        # scores' exponentials once.
        use_fused_bwd_kernel=True,
    )
    one = library.LocalMask((T, T), (window - 1, 0), 0) if window else library.CausalMask((T, T))
    mask = library.MultiHeadMask([one] * N)
    return library.make_splash_mha_single_device(
        mask,
        block_sizes=sizes,
        interpret=interpret,
        save_residuals=save_residuals,
        residual_checkpoint_name=KEPT,
    )
