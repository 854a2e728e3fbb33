"""Causal self-attention a block of queries at a time (Dao 2023, FlashAttention-2).

Equal to `kernels.attention.attend` under a causal mask, but scores exist only for one sequence and
one block of queries, and those above the diagonal or before a window are never computed. On CPU
this is several times faster than the whole [T, S] matrix, because a block stays in the processor's
cache: 8 times at B=32, T=256, eight heads of 8.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The name by which every kernel marks what rematerialisation may keep of it: its output, and the
# log of its denominators where there is one.
KEPT = "attention"
SMALLEST_BLOCK = 64  # queries; the fastest of 32, 64, 128 and 256 on CPU
MOST_BLOCKS = 16  # blocks are unrolled, so their number is bounded to keep compiling short


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    window: int = 0,
    slopes_N: jax.Array | None = None,
) -> jax.Array:
    """Causal softmax attention [B, T, N, H] of T queries over the same T positions.

    With `segments_BT`, the index of each position's document, no document attends to another; with
    a `window`, a query attends to the newest `window` positions; with `slopes_N`, the score of a
    key d positions before the query is lowered by d times the slope of the head.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    slopes_KG = None
    if slopes_N is not None:
        slopes_KG = jnp.asarray(slopes_N, jnp.float32).reshape(K, N // K)
    out_BKGTH = _sequences(window, q_BKGTH, k_BKSH, v_BKSH, segments_BT, slopes_KG)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sequences(
    window: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments_BT: jax.Array | None,
    slopes_KG: jax.Array | None,
) -> jax.Array:
    return _sequences_forward(window, q_BKGTH, k_BKSH, v_BKSH, segments_BT, slopes_KG)[0]


def _sequences_forward(window, q, k, v, segments, slopes):  # type: ignore[no-untyped-def]
    out, log_sum = jax.lax.map(lambda one: _forward(window, slopes, *one), (q, k, v, segments))
    out, log_sum = checkpoint_name(out, KEPT), checkpoint_name(log_sum, KEPT)
    return out, (slopes, (q, k, v, segments, out, log_sum))


def _sequences_backward(window, saved, out_gradient):  # type: ignore[no-untyped-def]
    slopes, saved = saved
    *gradients, slopes_BKG = jax.lax.map(
        lambda one: _backward(window, slopes, *one), (*saved, out_gradient)
    )
    return *gradients, None, None if slopes is None else slopes_BKG.sum(axis=0)


_sequences.defvjp(_sequences_forward, _sequences_backward)


def _blocks(T: int) -> list[tuple[int, int]]:
    """First and last+1 query of each block."""
    size = max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _keys(start: int, end: int, window: int) -> slice:
    """The keys that some query of a block attends to."""
    return slice(max(0, start - window + 1) if window else 0, end)


def _merge(x_KGTH: jax.Array, start: int, end: int) -> jax.Array:
    """One block's queries of all heads of a group, in one dim: [K, G·t, H]."""
    block = x_KGTH[:, :, start:end]
    return block.reshape(block.shape[0], -1, block.shape[-1])


def _scores(
    q_KRH: jax.Array,
    k_KSH: jax.Array,
    segments_T: jax.Array | None,
    start: int,
    end: int,
    window: int,
    slopes_KG: jax.Array | None,
) -> jax.Array:
    """Masked float32 scores [K, R, S] of a block with its `_keys`; R = G·t."""
    keys = _keys(start, end, window)
    scale = 1.0 / math.sqrt(q_KRH.shape[-1])
    scores_KRS = _matmul("KRH,KSH->KRS", q_KRH * scale, k_KSH[:, keys])
    query_R = start + jnp.arange(q_KRH.shape[1]) % (end - start)
    key_S = jnp.arange(keys.start, end)
    if slopes_KG is not None:
        slopes_KR = jnp.repeat(slopes_KG, end - start, axis=1)
        distance_RS = (query_R[:, None] - key_S[None]).astype(jnp.float32)
        scores_KRS -= slopes_KR[:, :, None] * distance_RS[None]
    seen_RS = key_S[None] <= query_R[:, None]
    if window:
        seen_RS &= key_S[None] > query_R[:, None] - window
    if segments_T is not None:
        # A gather: a tile would be fused, its indices computed anew for each score; twice as slow.
        seen_RS &= segments_T[None, keys] == segments_T[query_R][:, None]
    return jnp.where(seen_RS[None], scores_KRS, -jnp.inf)


_matmul = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(window, slopes_KG, q_KGTH, k_KSH, v_KSH, segments_T):  # type: ignore[no-untyped-def]
    """One sequence's output [K, G, T, H] and the log of its softmax denominators [K, G, T, 1]."""
    K, G, T, H = q_KGTH.shape
    outs, log_sums = [], []
    for start, end in _blocks(T):
        keys = _keys(start, end, window)
        q_KRH = _merge(q_KGTH, start, end)
        scores_KRS = _scores(q_KRH, k_KSH, segments_T, start, end, window, slopes_KG)
        highest_KR1 = scores_KRS.max(axis=-1, keepdims=True)
        weights_KRS = jnp.exp(scores_KRS - highest_KR1)
        sum_KR1 = weights_KRS.sum(axis=-1, keepdims=True)
        out_KRH = _matmul("KRS,KSH->KRH", weights_KRS.astype(v_KSH.dtype), v_KSH[:, keys])
        outs.append((out_KRH / sum_KR1).astype(q_KGTH.dtype).reshape(K, G, end - start, H))
        log_sums.append((highest_KR1 + jnp.log(sum_KR1)).reshape(K, G, end - start, 1))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_sums, axis=2)


def _backward(  # type: ignore[no-untyped-def]
    window, slopes_KG, q_KGTH, k_KSH, v_KSH, segments_T, out_KGTH, log_sum_KGT1, gradient_KGTH
):
    """The gradients of q, k, v and the slopes of one sequence, from that of its output."""
    K, G, T, H = q_KGTH.shape
    dtype, scale = q_KGTH.dtype, 1.0 / math.sqrt(H)
    wide_gradient = gradient_KGTH.astype(jnp.float32)
    shared_KGT1 = (wide_gradient * out_KGTH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    q_gradients = []
    slopes_gradient_KG = None if slopes_KG is None else jnp.zeros((K, G), jnp.float32)
    # [K, H, S], not [K, S, H]: this orientation of the two products is three times as fast on CPU.
    k_gradient_KHS = jnp.zeros((K, H, T), jnp.float32)
    v_gradient_KHS = jnp.zeros((K, H, T), jnp.float32)
    for start, end in _blocks(T):
        keys = _keys(start, end, window)
        part = partial(_merge, start=start, end=end)
        q_KRH, gradient_KRH = part(q_KGTH), part(gradient_KGTH)
        scores_KRS = _scores(q_KRH, k_KSH, segments_T, start, end, window, slopes_KG)
        weights_KRS = jnp.exp(scores_KRS - part(log_sum_KGT1))
        weight_gradient_KRS = _matmul("KRH,KSH->KRS", gradient_KRH, v_KSH[:, keys])
        score_gradient_KRS = weights_KRS * (weight_gradient_KRS - part(shared_KGT1))
        if slopes_KG is not None:
            distance_tS = jnp.arange(start, end)[:, None] - jnp.arange(keys.start, end)[None]
            by_query_KGtS = score_gradient_KRS.reshape(K, G, *distance_tS.shape)
            slopes_gradient_KG -= (by_query_KGtS * distance_tS[None, None]).sum(axis=(2, 3))
        score_gradient_KRS = (score_gradient_KRS * scale).astype(dtype)
        q_gradient_KRH = _matmul("KRS,KSH->KRH", score_gradient_KRS, k_KSH[:, keys])
        q_gradients.append(q_gradient_KRH.astype(dtype).reshape(K, G, end - start, H))
        k_part_KHS = _matmul("KRS,KRH->KHS", score_gradient_KRS, q_KRH)
        v_part_KHS = _matmul("KRS,KRH->KHS", weights_KRS.astype(dtype), gradient_KRH)
        k_gradient_KHS = k_gradient_KHS.at[:, :, keys].add(k_part_KHS)
        v_gradient_KHS = v_gradient_KHS.at[:, :, keys].add(v_part_KHS)
    k_gradient_KSH = k_gradient_KHS.swapaxes(1, 2).astype(dtype)
    v_gradient_KSH = v_gradient_KHS.swapaxes(1, 2).astype(dtype)
    q_gradient_KGTH = jnp.concatenate(q_gradients, axis=2)
    return q_gradient_KGTH, k_gradient_KSH, v_gradient_KSH, slopes_gradient_KG
