"""Causal self-attention on TPU by JAX's splash kernel (sparse flash attention, in Pallas).

Scores live in the chip's fast memory alone, and blocks above the diagonal are never computed.
Packed documents are told to the kernel as segment ids. Does not know when it is to be chosen.
"""

import math

import jax
import jax.numpy as jnp

from llama_jax.distributed.mesh import shard_heads

LANES = 128  # of the vector unit: what a block of the kernel is a multiple of
LARGEST_BLOCK = 512  # positions; two blocks of scores in float32 then fit beside their operands


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal softmax attention [B, T, N, H] of T queries over the same T positions.

    Args:
      q_BTNH: queries; the result has their dtype.
      k_BTKH: keys, K dividing N.
      v_BTKH: values.
      segments_BT: int32, the number of each position's document: none sees another. None: one.
      interpret: run the kernel's program step by step on any device, for tests.
    """

    def attend(*arrays: jax.Array) -> jax.Array:
        return _splash_attention(*arrays, interpret=interpret)

    segments = () if segments_BT is None else (segments_BT,)
    return shard_heads(attend, q_BTNH, k_BTKH, v_BTKH, *segments)


def block_length(T: int) -> int:
    """Positions in a block: as few blocks as can be, then as little to fill up as can be."""
    blocks = -(-T // LARGEST_BLOCK)
    return -(-T // (blocks * LANES)) * LANES


def _splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    interpret: bool,
) -> jax.Array:
    """`splash_attention` on one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    T, N, H = q_BTNH.shape[1:]
    block = block_length(T)
    scaled_BTNH = q_BTNH * (1.0 / math.sqrt(H))  # the kernel does not scale
    # Positions filled up come last, so no query before them looks there.
    more = -T % block
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (scaled_BTNH, k_BTKH, v_BTKH)
    )
    ids = None
    if segments_BT is not None:
        filled_BT = jnp.pad(segments_BT, ((0, 0), (0, more)))
        ids = SegmentIds(filled_BT, filled_BT)
    out_BNTH = jax.vmap(_kernel(T + more, N, block, interpret))(q, k, v, ids)
    return out_BNTH.swapaxes(1, 2)[:, :T]


def _kernel(T: int, N: int, block: int, interpret: bool):  # type: ignore[no-untyped-def]
    """The kernel of one row: ([N, T, H], [K, T, H], [K, T, H], segment ids) → [N, T, H]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = library.MultiHeadMask([library.CausalMask((T, T))] * N)
    return library.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
