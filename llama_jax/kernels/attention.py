"""Causal attention within whole sequences, by one of several kernels that compute the same.

Each takes queries [B, T, N, H], keys and values [B, T, K, H] with K dividing N and, for sequences
packed with several documents, `segments_BT`: the index of each position's document. A query attends
to positions up to its own, of its own document; with a sliding `window` (Beltagy et al. 2020) to
the newest `window` of them, its own included; 0: no window. With `slopes_N`, the score of a key d
positions before the query is lowered by d times the slope of the head (Press et al. 2022).
`choose_kernel` decides which one runs; none falls back to another by itself.

Masks are boolean, True where a query may attend.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.errors import UsageError
from llama_jax.kernels import cudnn, triton
from llama_jax.kernels.blockwise import KEPT, blockwise_attention
from llama_jax.kernels.matmul import with_rows_of_a_tile
from llama_jax.kernels.splash import splash_attention

# (q_BTNH, k_BTKH, v_BTKH, segments_BT or None, dropout of weights or None, *, window=0,
#  slopes_N=None) -> [B, T, N, H]
AttentionKernel = Callable[..., jax.Array]
Dropout = Callable[[jax.Array], jax.Array]

BIASED = ("alibi", "relative")  # values of `model.position` that pass `slopes_N`


def causal_mask(positions_BT: jax.Array, key_length: int, window: int = 0) -> jax.Array:
    """[B, T, S]: True where slot s holds a token at or before the query's position.

    With a `window` the token is also less than `window` positions before it.
    """
    slots_S = jnp.arange(key_length)[None, None]
    mask_BTS = slots_S <= positions_BT[:, :, None]
    return mask_BTS & (slots_S > positions_BT[:, :, None] - window) if window else mask_BTS


def distance_bias(slopes_N: jax.Array, distance_BTS: jax.Array) -> jax.Array:
    """What is added to scores, float32 [N, B, T, S]: minus the slope of a head times the distance.

    Args:
      distance_BTS: positions from each key to each query, where it is not masked; B and T may be 1.
    """
    slopes_N111 = slopes_N.astype(jnp.float32)[:, None, None, None]
    return -slopes_N111 * distance_BTS.astype(jnp.float32)[None]


def merge_heads_and_batch(x_BTKH: jax.Array) -> jax.Array:
    """Keys or values as [R, T, H] with R = K·B, the layout that `attend` and the cache use."""
    B, T, K, H = x_BTKH.shape
    return x_BTKH.transpose(2, 0, 1, 3).reshape(K * B, T, H)


def attend(
    q_BTNH: jax.Array,
    keys_RSH: jax.Array,
    values_RSH: jax.Array,
    mask_BTS: jax.Array,
    dropout: Dropout | None = None,
    bias_NBTS: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query softmax attention, [B, T, N, H], with float32 scores.

    Each of the K key/value heads serves G = N/K query heads (Ainslie et al. 2023). Keys and values
    come as `merge_heads_and_batch` makes them, R = K·B; queries are brought to [R, G·T, H].

    Args:
      dropout: applied to the attention weights [K, B, G, T, S].
      bias_NBTS: added to the scores, see `distance_bias`.
    """
    B, T, N, H = q_BTNH.shape
    K = keys_RSH.shape[0] // B
    q_RMH = _by_kv_head(q_BTNH, K)
    multiply = partial(jnp.einsum, "RMH,RSH->RMS", preferred_element_type=jnp.float32)
    scores_RMS = with_rows_of_a_tile(multiply, q_RMH, keys_RSH) * (1.0 / math.sqrt(H))
    scores_KBGTS = jnp.where(
        mask_BTS[None, :, None],
        _biased(scores_RMS.reshape(K, B, N // K, T, -1), bias_NBTS),
        -jnp.inf,
    )
    weights_KBGTS = jax.nn.softmax(scores_KBGTS, axis=-1).astype(values_RSH.dtype)
    if dropout is not None:
        weights_KBGTS = dropout(weights_KBGTS)
    weights_RMS = weights_KBGTS.reshape(scores_RMS.shape)
    out_RMH = with_rows_of_a_tile(partial(jnp.einsum, "RMS,RSH->RMH"), weights_RMS, values_RSH)
    return out_RMH.reshape(K, B, N // K, T, H).transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


def attend_in_chunks(
    q_BTNH: jax.Array,
    own: tuple[jax.Array, jax.Array],
    own_mask_BTC: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    mask: Callable[[jax.Array], jax.Array],
    num_chunks: jax.Array,
    bias: tuple[jax.Array, Callable[[jax.Array], jax.Array]] | None = None,
    among_own: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
) -> jax.Array:
    """`attend` over keys and values that are read a chunk at a time, by an online softmax.

    The sums run over `own` and then chunk 0, 1, … (Milakov and Gimelshein 2018). A chunk that is
    masked for a query adds zeros and multiplies by one: not a bit of its result changes.

    Args:
      own: keys and values [R, C, H] of which each query attends to at least one.
      own_mask_BTC: for them; a dim may be 1 where it makes no difference.
      read: keys and values of a chunk, [R, C, H].
      mask: which of them a query attends to, [B, T, C].
      num_chunks: how many there are; an array, so that it may differ from call to call.
      bias: added to the scores, [N, B, T, C], of `own` and as a function of a chunk.
      among_own: a kernel for `own` in place of their mask, see `model.execution`; without a bias.
    """
    B, T, N, H = q_BTNH.shape
    K = own[0].shape[0] // B
    q_RMH = _by_kv_head(q_BTNH, K)
    f32 = {"preferred_element_type": jnp.float32}

    def scores(keys_RCH: jax.Array, mask_BTC: jax.Array, bias_NBTC: jax.Array | None) -> jax.Array:
        multiply = partial(jnp.einsum, "RMH,RCH->RMC", **f32)
        scores_RMC = with_rows_of_a_tile(multiply, q_RMH, keys_RCH) * (1.0 / math.sqrt(H))
        by_query = _biased(scores_RMC.reshape(K, B, N // K, T, -1), bias_NBTC)
        return jnp.where(mask_BTC[None, :, None], by_query, -jnp.inf).reshape(scores_RMC.shape)

    def add(chunk: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        keys_RCH, values_RCH = read(chunk)
        chunk_bias = bias[1](chunk) if bias is not None else None
        return added(sums, scores(keys_RCH, mask(chunk), chunk_bias), values_RCH)

    def added(
        sums: tuple[jax.Array, ...], scores_RMC: jax.Array, values_RCH: jax.Array
    ) -> tuple[jax.Array, ...]:
        largest_RM1, weight_RM1, out_RMH = sums
        new_RM1 = jnp.maximum(largest_RM1, scores_RMC.max(axis=-1, keepdims=True))
        weights_RMC, rescale_RM1 = jnp.exp(scores_RMC - new_RM1), jnp.exp(largest_RM1 - new_RM1)
        multiply = partial(jnp.einsum, "RMC,RCH->RMH", **f32)
        mixed = with_rows_of_a_tile(multiply, weights_RMC.astype(values_RCH.dtype), values_RCH)
        total_RM1 = weight_RM1 * rescale_RM1 + weights_RMC.sum(axis=-1, keepdims=True)
        return new_RM1, total_RM1, out_RMH * rescale_RM1 + mixed

    def among_own_by_mask() -> tuple[jax.Array, ...]:
        own_scores_RMC = scores(own[0], own_mask_BTC, bias[0] if bias is not None else None)
        largest_RM1 = own_scores_RMC.max(axis=-1, keepdims=True)
        nothing = (largest_RM1, jnp.zeros_like(largest_RM1), jnp.zeros(q_RMH.shape, jnp.float32))
        return added(nothing, own_scores_RMC, own[1])

    def among_own_by(kernel: Callable[..., tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        own_BCKH = (x_RCH.reshape(K, B, -1, H).transpose(1, 2, 0, 3) for x_RCH in own)
        found = kernel(q_BTNH, *own_BCKH)
        out_RMH, log_sum_RM1 = (_by_kv_head(x_BTN, K).astype(jnp.float32) for x_BTN in found)
        return log_sum_RM1, jnp.ones_like(log_sum_RM1), out_RMH

    if among_own is not None and bias is None:
        start = among_own_by(among_own)
    else:
        start = among_own_by_mask()
    _, total_RM1, out_RMH = jax.lax.fori_loop(0, num_chunks, add, start)
    out_RMH = (out_RMH / total_RM1).astype(own[1].dtype)
    return out_RMH.reshape(K, B, N // K, T, H).transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


def _by_kv_head(x_BTNH: jax.Array, K: int) -> jax.Array:
    """Queries, or what belongs to them, [R, M, H]: R = K·B, and M = G·T of each kv head."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K * B, -1, H)


def _biased(scores_KBGTS: jax.Array, bias_NBTS: jax.Array | None) -> jax.Array:
    """Scores with a bias of each head added, if there is one."""
    if bias_NBTS is None:
        return scores_KBGTS
    bias_KGBTS = bias_NBTS.reshape(scores_KBGTS.shape[0], -1, *bias_NBTS.shape[1:])
    return scores_KBGTS + bias_KGBTS.swapaxes(1, 2)


def xla_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    dropout: Dropout | None = None,
    *,
    window: int = 0,
    slopes_N: jax.Array | None = None,
) -> jax.Array:
    """The reference: holds all scores at once. Runs everywhere; the only one with dropout."""
    T = q_BTNH.shape[1]
    mask_BTS = causal_mask(jnp.arange(T)[None], T, window)
    if segments_BT is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    keys_RSH, values_RSH = merge_heads_and_batch(k_BTKH), merge_heads_and_batch(v_BTKH)
    bias_NBTS = None
    if slopes_N is not None:  # documents too: within one, distances are those of the sequence
        index_T = jnp.arange(T)
        bias_NBTS = distance_bias(slopes_N, index_T[None, :, None] - index_T[None, None])
    out_BTNH = attend(q_BTNH, keys_RSH, values_RSH, mask_BTS, dropout, bias_NBTS)
    return checkpoint_name(out_BTNH, KEPT)


KERNELS: dict[str, AttentionKernel] = {
    "xla": xla_attention,
    "blockwise": blockwise_attention,
    "cudnn": cudnn.cudnn_attention,
    "triton": triton.triton_attention,
    "splash": splash_attention,
}
TAKES_SLOPES = ("xla", "blockwise")
DROPS_WEIGHTS = ("xla",)
FOR_NVIDIA = {"cudnn": cudnn.refusal, "triton": triton.refusal}  # and what else they cannot do
FASTEST = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}  # by platform; elsewhere `xla`


def choose_kernel(
    name: str,
    device: jax.Device,
    *,
    head_dim: int,
    dtype: str,
    dropout: float = 0.0,
    position: str = "rope",
) -> str:
    """The name of the kernel to run: `name`, or for "auto" the fastest that can.

    On accelerators "auto" takes a fused kernel with dropout too, which then acts on the residual
    branches alone: to drop attention weights, all of them have to be held in memory.

    Args:
      name: a key of `KERNELS`, or "auto".
      device: one of those the program is for; they need not be this machine's.
      head_dim: width of a head.
      dtype: name of the compute dtype.
      dropout: the fraction that the model drops.
      position: the `model.position`.

    Raises:
      UsageError: when the named kernel cannot do this.
    """
    chosen = FASTEST.get(device.platform, "xla") if name == "auto" else name
    if name == "auto" and device.platform != "cpu":
        dropout = 0.0
    reason = _refusal(chosen, device, head_dim, dtype, dropout, position)
    if not reason:
        return chosen
    if name == "auto":
        return "xla"
    raise UsageError(f"run.attention={name!r} {reason}")


def _refusal(
    name: str, device: jax.Device, head_dim: int, dtype: str, dropout: float, position: str
) -> str:
    """Why a kernel cannot do what is requested, and what to do instead; "" if it can."""
    if dropout and name not in DROPS_WEIGHTS:
        return (
            f"cannot drop attention weights and model.dropout is {dropout:g};"
            " use run.attention='auto' or 'xla', or model.dropout=0"
        )
    if position in BIASED and name not in TAKES_SLOPES:
        return (
            f"cannot lower scores by distance and model.position={position!r} does; use"
            " run.attention='auto'"
        )
    if name == "splash" and device.platform != "tpu":
        return f"needs a TPU and this run is on {device.device_kind}; use run.attention='auto'"
    if name not in FOR_NVIDIA:
        return ""
    return cudnn.gpu_refusal(device, dtype) or FOR_NVIDIA[name](device, head_dim)
