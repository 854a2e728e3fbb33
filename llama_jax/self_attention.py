"""Causal attention within whole sequences, by one of several kernels that compute the same.

Each takes [B, T, heads, H] queries, keys and values and, for rows packed with several documents,
`segments_BT`: the number of each position's document. A query looks at the positions up to its own,
of its own document. Which kernel runs is asked for by name or chosen once, by `chosen_backend`, and
said in the log; none falls back to another by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.attention import attend, causal_mask
from llama_jax.blockwise import causal_attention
from llama_jax.cache import merged_rows
from llama_jax.errors import UsageError

# (queries, keys, values, segments or none, dropout rate, dropout key or none) → [B, T, N, H]
SelfAttention = Callable[..., jax.Array]


def xla(
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


def blockwise(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """A block of queries at a time: several times as fast on CPU."""
    assert dropout_key is None, "only the `xla` attention drops weights"
    return causal_attention(q_BTNH, k_BTKH, v_BTKH)


BACKENDS: dict[str, SelfAttention] = {"xla": xla, "blockwise": blockwise}
FASTEST = {"cpu": "blockwise"}  # by platform; elsewhere `xla`


def chosen_backend(asked: str, platform: str, dropout: float) -> str:
    """The name of the kernel to run: the one asked for, or for "auto" the fastest there is.

    Raises:
      UsageError: when the one asked for cannot do what is wanted.
    """
    if asked == "auto":
        return "xla" if dropout else FASTEST.get(platform, "xla")
    if dropout and asked != "xla":
        raise UsageError(
            f"run.attention={asked!r} cannot drop attention weights and model.dropout is"
            f" {dropout:g}; use run.attention='xla' or model.dropout=0"
        )
    return asked


def self_attention(asked: str, dropout: float = 0.0) -> SelfAttention:
    """The kernel for the devices of this process; `asked` as in `chosen_backend`."""
    return BACKENDS[chosen_backend(asked, jax.default_backend(), dropout)]
