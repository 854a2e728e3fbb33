"""Causal attention within whole sequences, by one of several kernels that compute the same.

Each takes [B, T, heads, H] queries, keys and values and, for rows packed with several documents,
`segments_BT`: the number of each position's document. A query looks at the positions up to its own,
of its own document. Which kernel runs is asked for by name or chosen once, by `chosen_backend`, and
said in the log; none falls back to another by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.errors import UsageError
from llama_jax.kernels import cudnn
from llama_jax.kernels.blockwise import causal_attention
from llama_jax.kernels.splash import splash_attention
from llama_jax.model.attention import attend, causal_mask
from llama_jax.model.cache import merged_rows

# (queries, keys, values, segments or none, dropout rate, dropout key or none) → [B, T, N, H]
SelfAttention = Callable[..., jax.Array]


def xla_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The plain form, which holds all scores at once; everywhere, and the only one with dropout."""
    T = q_BTNH.shape[1]
    mask_BTS = causal_mask(jnp.arange(T)[None], T)
    if segments_BT is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    keys_RSH, values_RSH = merged_rows(k_BTKH), merged_rows(v_BTKH)
    return attend(q_BTNH, keys_RSH, values_RSH, mask_BTS, dropout_rate, dropout_key)


def _without_dropout(kernel: Callable[..., jax.Array]) -> SelfAttention:
    """A kernel that drops no weights, with the face of one that could."""

    def attention(
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        segments_BT: jax.Array | None = None,
        dropout_rate: float = 0.0,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        assert dropout_key is None, "only the `xla` attention drops weights"
        return kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT)

    return attention


BACKENDS: dict[str, SelfAttention] = {
    "xla": xla_attention,
    "blockwise": _without_dropout(causal_attention),
    "cudnn": _without_dropout(cudnn.cudnn_attention),
    "splash": _without_dropout(splash_attention),
}
FASTEST = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}  # by platform; elsewhere `xla`


def chosen_backend(
    asked: str, config: ModelConfig, device: jax.Device, dropout: float = 0.0
) -> str:
    """The name of the kernel to run: the one asked for, or for "auto" the fastest there is.

    Args:
      asked: a name, or "auto".
      config: the model, whose numerics not every kernel takes.
      device: one of those the program is for; they need not be this machine's.
      dropout: the fraction of attention weights dropped.

    Raises:
      UsageError: when the one asked for cannot do what is wanted.
    """
    name = FASTEST.get(device.platform, "xla") if asked == "auto" else asked
    refusal = _refusal(name, config, device, dropout)
    if not refusal:
        return name
    if asked == "auto":
        return "xla"
    raise UsageError(f"run.attention={asked!r} {refusal}")


def _refusal(name: str, config: ModelConfig, device: jax.Device, dropout: float) -> str:
    """Why a kernel cannot do what is wanted, with the way out; "" if it can."""
    if dropout and name != "xla":
        return (
            f"cannot drop attention weights and model.dropout is {dropout:g};"
            " use run.attention='xla' or model.dropout=0"
        )
    if name == "splash" and device.platform != "tpu":
        return f"needs a TPU and this run is on {device.device_kind}; use run.attention='auto'"
    return cudnn.refusal(config, device) if name == "cudnn" else ""


def self_attention(
    asked: str, config: ModelConfig, dropout: float = 0.0, device: jax.Device | None = None
) -> SelfAttention:
    """The kernel that `chosen_backend` names, for this process's devices or for `device`."""
    return BACKENDS[chosen_backend(asked, config, device or jax.local_devices()[0], dropout)]
