"""Causal self-attention on NVIDIA GPUs by Pallas kernels of ours, which Triton compiles.

For packed documents: `jax.nn` passes them to cuDNN as a mask [B, 1, T, T], which is read from
memory, and so is its gradient. Here a query attends to the keys from the first of its document, or
of its window, up to its own. That is one number for a query, no mask; and since it never falls from
a query to the next, blocks of other documents are not computed (Dao 2023, FlashAttention-2, but for
where loops begin and end).
"""

import importlib.util
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from llama_jax.kernels.blockwise import KEPT

OWN_BLOCK = 128  # queries (for the gradients of keys and values: keys) that a program computes
FORWARD_STEP = 64  # keys that it reads at a time
BACKWARD_STEP = 32  # likewise, or queries: with their gradients, twice the operands
SMALLEST_BLOCK = 16  # of the tensor cores' matmuls
NARROW_HEADS, WIDE_HEADS = 64, 128  # up to here four warps; with wider ones half the positions fit
WIDEST_HEADS = 256
MASKED = -1e30  # finite, so that a block in which a query attends to nothing is no NaN


def triton_attention(
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
      segments_BT: int32, the index of each position's document, whose positions are adjacent; None:
        one document.
      window: newest positions that a query attends to; 0: all.
      interpret: interpret the kernels on any device, for tests.
    """
    B, T, _, H = q_BTNH.shape
    width = max(SMALLEST_BLOCK, pl.next_power_of_2(H))
    most = OWN_BLOCK if width <= WIDE_HEADS else OWN_BLOCK // 2
    own = max(SMALLEST_BLOCK, min(pl.next_power_of_2(T), most))
    padding = (0, -T % own)  # it comes last, so no query attends to it
    q, k, v = (
        jnp.pad(x, ((0, 0), padding, (0, 0), (0, width - H))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), padding), mode="edge")
    first_BT, last_BT = _attended(B, q.shape[1], segments_BT, window)
    out = _attend((1.0 / math.sqrt(H), own, interpret), q, k, v, first_BT, last_BT)
    return out[:, :T, :, :H]


def refusal(device: jax.Device, head_dim: int) -> str:
    """Why heads so wide cannot be computed here, and what to do; "" if they can."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return (
            f"needs Pallas's Triton backend and jax {jax.__version__} has none;"
            " install jax 0.10 to 0.12, or use run.attention='cudnn'"
        )
    if head_dim > WIDEST_HEADS:
        return (
            f"takes head dims up to {WIDEST_HEADS} and this model's are {head_dim};"
            " use run.attention='xla'"
        )
    return ""


def _attended(
    B: int, T: int, segments_BT: jax.Array | None, window: int
) -> tuple[jax.Array, jax.Array]:
    """The first key of each query and the last query of each key, int32 [B, T]."""
    index_1T = jnp.arange(T, dtype=jnp.int32)[None]
    first_BT, last_BT = jnp.zeros((B, T), jnp.int32), jnp.full((B, T), T - 1, jnp.int32)
    if segments_BT is not None:
        first_BT = segment_starts(segments_BT)
        last_BT = T - 1 - segment_starts(segments_BT[:, ::-1])[:, ::-1]
    if window:
        first_BT = jnp.maximum(first_BT, index_1T - (window - 1))
        last_BT = jnp.minimum(last_BT, index_1T + (window - 1))
    return first_BT, last_BT


def segment_starts(segments_BT: jax.Array) -> jax.Array:
    """The position [B, T], int32, at which each one's segment starts: a run of equal ids."""
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(begins_BT, index_T[None], 0), axis=1)


Options = tuple[float, int, bool]  # the factor of scores, the block of a program, interpret


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: Options,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    last_BT: jax.Array,
) -> jax.Array:
    return _forward(options, q_BTNH, k_BTKH, v_BTKH, first_BT, last_BT)[0]


def _forward(options, q, k, v, first, last):  # type: ignore[no-untyped-def]
    (scale, own, interpret), (B, T, N, H) = options, q.shape
    specs = _Specs(own, T, H, N // k.shape[2])
    out, log_sum = pl.pallas_call(
        partial(_forward_kernel, scale=scale),
        grid=(T // own, N, B),
        in_specs=[specs.own, specs.shared, specs.shared, specs.numbers],
        out_specs=[specs.own, specs.own_sums],
        out_shape=[q, jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        **_compilation(H, interpret),
    )(q, k, v, first)
    out, log_sum = checkpoint_name(out, KEPT), checkpoint_name(log_sum, KEPT)
    return out, (q, k, v, first, last, out, log_sum)


def _backward(options, saved, gradient):  # type: ignore[no-untyped-def]
    (scale, own, interpret), (q, k, v, first, last, out, log_sum) = options, saved
    (B, T, N, H), K = q.shape, k.shape[2]
    specs = _Specs(own, T, H, N // K)
    products = out.astype(jnp.float32) * gradient.astype(jnp.float32)
    mean = products.sum(axis=-1).swapaxes(1, 2)  # of a query's weight gradients: [B, N, T]
    q_gradient = pl.pallas_call(
        partial(_query_kernel, scale=scale),
        grid=(T // own, N, B),
        in_specs=[
            *(specs.own, specs.shared, specs.shared, specs.numbers),
            *(specs.own, specs.own_sums, specs.own_sums),
        ],
        out_specs=specs.own,
        out_shape=q,
        **_compilation(H, interpret),
    )(q, k, v, first, gradient, log_sum, mean)
    k_gradient, v_gradient = pl.pallas_call(
        partial(_key_kernel, scale=scale),
        grid=(T // own, K, B),
        in_specs=[
            *(specs.group, specs.own, specs.own, specs.all_numbers, specs.numbers),
            *(specs.group, specs.group_sums, specs.group_sums),
        ],
        out_specs=[specs.own, specs.own],
        out_shape=[k, v],
        **_compilation(H, interpret),
    )(q, k, v, first, last, gradient, log_sum, mean)
    return q_gradient, k_gradient, v_gradient, None, None


_attend.defvjp(_forward, _backward)


class _Specs:
    """What a program (block of positions, head, sequence) sees of each array."""

    def __init__(self, own: int, T: int, H: int, G: int):
        spec = pl.BlockSpec
        self.own = spec((None, own, None, H), lambda i, n, b: (b, i, n, 0))
        self.own_sums = spec((None, None, own), lambda i, n, b: (b, n, i))
        self.numbers = spec((None, own), lambda i, n, b: (b, i))
        self.all_numbers = spec((None, T), lambda i, n, b: (b, 0))
        # All keys or values of a query head; all queries of a key head.
        self.shared = spec((None, T, None, H), lambda i, n, b: (b, 0, n // G, 0))
        self.group = spec((None, T, G, H), lambda i, k, b: (b, 0, k, 0))
        self.group_sums = spec((None, G, T), lambda i, k, b: (b, k, 0))


def _compilation(H: int, interpret: bool) -> dict[str, Any]:
    from jax.experimental.pallas.triton import CompilerParams

    params = CompilerParams(num_warps=4 if H <= NARROW_HEADS else 8, num_stages=2)
    return {"compiler_params": params, "interpret": interpret}


def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ref, k_ref, v_ref, first_ref, out_ref, log_sum_ref, *, scale
):
    """The output of a block of queries, and log2 of the sum of each one's 2^scores."""
    Q, H = q_ref.shape
    step = _step(FORWARD_STEP, Q, H)
    start = pl.program_id(0) * Q
    q_QH, first_Q = q_ref[...], first_ref[...]

    def add(block, sums):  # type: ignore[no-untyped-def]
        out_QH, largest_Q, total_Q = sums
        at = pl.ds(block * step, step)
        scores_QS = _scores(q_QH, k_ref[at, :], scale)
        scores_QS = _masked(scores_QS, first_Q, start, block * step, query_dim=0)
        new_Q = jnp.maximum(largest_Q, scores_QS.max(axis=1))
        weights_QS, rescale_Q = jnp.exp2(scores_QS - new_Q[:, None]), jnp.exp2(largest_Q - new_Q)
        v_SH = v_ref[at, :]
        out_QH = out_QH * rescale_Q[:, None] + _dot(weights_QS.astype(v_SH.dtype), v_SH)
        return out_QH, new_Q, total_Q * rescale_Q + weights_QS.sum(axis=1)

    zeros_Q = jnp.zeros((Q,), jnp.float32)
    sums = jnp.zeros((Q, H), jnp.float32), zeros_Q + MASKED, zeros_Q
    begin, end = first_ref[0] // step, pl.cdiv(start + Q, step)
    out_QH, largest_Q, total_Q = jax.lax.fori_loop(begin, end, add, sums)
    out_ref[...] = (out_QH / total_Q[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = largest_Q + jnp.log2(total_Q)


def _query_kernel(  # type: ignore[no-untyped-def]
    q_ref, k_ref, v_ref, first_ref, gradient_ref, log_sum_ref, mean_ref, q_gradient_ref, *, scale
):
    """The gradient of a block of queries."""
    Q, H = q_ref.shape
    step = _step(BACKWARD_STEP, Q, H)
    start = pl.program_id(0) * Q
    q_QH, gradient_QH, first_Q = q_ref[...], gradient_ref[...], first_ref[...]
    log_sum_Q, mean_Q = log_sum_ref[...], mean_ref[...]

    def add(block, q_gradient_QH):  # type: ignore[no-untyped-def]
        at = pl.ds(block * step, step)
        k_SH = k_ref[at, :]
        scores_QS = _scores(q_QH, k_SH, scale)
        scores_QS = _masked(scores_QS, first_Q, start, block * step, query_dim=0)
        weights_QS = jnp.exp2(scores_QS - log_sum_Q[:, None])
        score_gradient_QS = weights_QS * (_dot(gradient_QH, v_ref[at, :].T) - mean_Q[:, None])
        return q_gradient_QH + _dot(score_gradient_QS.astype(k_SH.dtype), k_SH)

    begin, end = first_ref[0] // step, pl.cdiv(start + Q, step)
    q_gradient_QH = jax.lax.fori_loop(begin, end, add, jnp.zeros((Q, H), jnp.float32))
    q_gradient_ref[...] = (q_gradient_QH * scale).astype(q_gradient_ref.dtype)


def _key_kernel(  # type: ignore[no-untyped-def]
    q_ref, k_ref, v_ref, first_ref, last_ref, gradient_ref, log_sum_ref, mean_ref,
    k_gradient_ref, v_gradient_ref, *, scale,
):  # fmt: skip
    """The gradients of a block of keys and values, by the queries of all heads that they serve."""
    S, H = k_ref.shape
    step = _step(BACKWARD_STEP, S, H)
    start = pl.program_id(0) * S
    k_SH, v_SH = k_ref[...], v_ref[...]
    begin, end = start // step, last_ref[S - 1] // step + 1

    def add(head, block, sums):  # type: ignore[no-untyped-def]
        k_gradient_SH, v_gradient_SH = sums
        at = pl.ds(block * step, step)
        q_QH, gradient_QH = q_ref[at, head, :], gradient_ref[at, head, :]
        scores_SQ = _scores(k_SH, q_QH, scale)
        scores_SQ = _masked(scores_SQ, first_ref[at], block * step, start, query_dim=1)
        weights_SQ = jnp.exp2(scores_SQ - log_sum_ref[head, at][None])
        score_gradient_SQ = weights_SQ * (_dot(v_SH, gradient_QH.T) - mean_ref[head, at][None])
        k_gradient_SH += _dot(score_gradient_SQ.astype(q_QH.dtype), q_QH)
        return k_gradient_SH, v_gradient_SH + _dot(
            weights_SQ.astype(gradient_QH.dtype), gradient_QH
        )

    def add_head(head, sums):  # type: ignore[no-untyped-def]
        return jax.lax.fori_loop(begin, end, partial(add, head), sums)

    zeros_SH = jnp.zeros((S, H), jnp.float32)
    heads = q_ref.shape[1]
    k_gradient_SH, v_gradient_SH = jax.lax.fori_loop(0, heads, add_head, (zeros_SH, zeros_SH))
    k_gradient_ref[...] = (k_gradient_SH * scale).astype(k_gradient_ref.dtype)
    v_gradient_ref[...] = v_gradient_SH.astype(v_gradient_ref.dtype)


def _step(most: int, own: int, H: int) -> int:
    """Positions that a program reads at a time."""
    return min(most if H <= WIDE_HEADS else most // 2, own)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _scores(left_XH: jax.Array, right_YH: jax.Array, scale: float) -> jax.Array:
    """Scaled scores [X, Y] of queries and keys, or of keys and queries, in units of log 2."""
    return _dot(left_XH, right_YH.T) * (scale * math.log2(math.e))


def _masked(  # type: ignore[no-untyped-def]
    scores, first_Q, first_query, first_key, query_dim
):
    """Scores where a key lies between the first of its query and the query itself."""
    query, key = (
        jax.lax.broadcasted_iota(jnp.int32, scores.shape, d) for d in (query_dim, 1 - query_dim)
    )
    query, key = query + first_query, key + first_key
    first = jnp.expand_dims(first_Q, 1 - query_dim)
    return jnp.where((key >= first) & (key <= query), scores, MASKED)
