"""Causal self-attention on NVIDIA GPUs by cuDNN's flash attention, as `jax.nn` offers it.

Scores never exist in the GPU's memory. The mask of packed documents does, as bfloat16 [B, 1, T, T],
and so does its gradient, which nothing reads: `jax.nn` has no public way to tell cuDNN where
documents begin. `kernels.triton` needs none.
"""

import jax
import jax.numpy as jnp

from llama_jax.errors import UsageError

OLDEST_GPU = 8.0  # compute capability: Ampere; before it, no bfloat16 and no flash attention
WIDE_HEADS_GPU = 9.0  # Hopper; before it heads are at most half as wide


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    window: int = 0,
) -> jax.Array:
    """Causal softmax attention [B, T, N, H] of T queries over the same T positions.

    Args:
      q_BTNH: queries, bfloat16.
      k_BTKH: keys, K dividing N.
      v_BTKH: values.
      segments_BT: int32, the index of each position's document; None: one document.
      window: newest positions that a query attends to; 0: all.

    Raises:
      UsageError: when the library refuses; it never computes in another way instead.
    """
    T = q_BTNH.shape[1]
    even = ((0, 0), (0, T % 2))  # cuDNN trains on even lengths only; no query attends past itself
    q, k, v = (jnp.pad(x, (*even, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    mask_B1TS = None
    if segments_BT is not None:
        filled_BT, positions_T = jnp.pad(segments_BT, even), jnp.arange(q.shape[1])
        mask_BTS = filled_BT[:, :, None] == filled_BT[:, None, :]
        if window:  # in the mask: before its version 9.10.2, cuDNN takes no window beside one
            mask_BTS &= (positions_T[:, None] < positions_T[None] + window)[None]
        mask_B1TS = mask_BTS[:, None]
    try:
        out_BTNH = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask_B1TS,
            is_causal=True,
            # So many before the query's own position: cuDNN's "(pos - window, pos]".
            local_window_size=(window - 1, 0) if window and mask_B1TS is None else None,
            implementation="cudnn",
        )
    except RuntimeError as error:  # NotImplementedError too: shapes, versions; no cuDNN at all
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"cuDNN's attention is not available here: {reason}; use run.attention='xla'"
        ) from error
    return out_BTNH[:, :T]


def gpu_refusal(device: jax.Device, dtype: str) -> str:
    """Why no kernel for NVIDIA GPUs can compute on a device, and what to do; "" if one can."""
    capability = _capability(device)
    if capability < OLDEST_GPU:
        return (
            f"needs an NVIDIA GPU of compute capability {OLDEST_GPU:g} or more and this run is on"
            f" {device.device_kind}; use run.attention='auto'"
        )
    if dtype != "bfloat16":
        return (
            f"computes in bfloat16 and model.compute_dtype={dtype!r}; use"
            " model.compute_dtype='bfloat16' or run.attention='xla'"
        )
    return ""


def refusal(device: jax.Device, head_dim: int) -> str:
    """Why cuDNN cannot compute heads so wide on an NVIDIA GPU, and what to do; "" if it can."""
    widest = 256 if _capability(device) >= WIDE_HEADS_GPU else 128
    if head_dim % 8 or head_dim > widest:
        return (
            f"takes head dims that are multiples of 8 up to {widest} on this GPU and"
            f" this model's are {head_dim}; use run.attention='xla'"
        )
    return ""


def _capability(device: jax.Device) -> float:
    """The compute capability of an NVIDIA GPU; 0 for anything else."""
    said = str(getattr(device, "compute_capability", ""))  # AMD's begins with "gfx"
    return float(said) if device.platform == "gpu" and said[:1].isdigit() else 0.0
