"""Grouped-query attention (Ainslie et al. 2023): queries in N heads share K heads of keys.

Masks are boolean, True where a query may look. Attention does not know where its cache is kept.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config import ModelConfig
from llama_jax.model.cache import Int8LayerCache, LayerCache
from llama_jax.model.execution import named
from llama_jax.model.layers import Linear, dropout
from llama_jax.model.positions import rotate

Cache = LayerCache | Int8LayerCache | None

# How a block attends: (queries, keys, values, its cache or none, dropout key or none) → what is
# attended to, [B, T, N, H], and the cache one on. `Llama.hidden` makes it, the same for all blocks.
Look = Callable[[jax.Array, jax.Array, jax.Array, Cache, jax.Array | None], tuple[jax.Array, Cache]]


def causal_mask(positions_BT: jax.Array, key_length: int) -> jax.Array:
    """[B, T, S]: True where slot s holds a token at or before the query's position."""
    return jnp.arange(key_length)[None, None] <= positions_BT[:, :, None]


def attend(
    q_BTNH: jax.Array,
    keys_RSH: jax.Array,
    values_RSH: jax.Array,
    mask_BTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, [B, T, N, H], with float32 scores; each kv head serves G = N/K heads.

    Keys and values lie as in `cache.LayerCache`, R = K·B; queries are brought to [R, G·T, H].
    """
    B, T, N, H = q_BTNH.shape
    K = keys_RSH.shape[0] // B
    q_KBGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(2, 0, 3, 1, 4)
    q_RMH = q_KBGTH.reshape(K * B, -1, H)  # M = G·T
    scores_RMS = jnp.einsum("RMH,RSH->RMS", q_RMH, keys_RSH, preferred_element_type=jnp.float32) * (
        1.0 / math.sqrt(H)
    )
    scores_KBGTS = jnp.where(
        mask_BTS[None, :, None], scores_RMS.reshape(K, B, N // K, T, -1), -jnp.inf
    )
    weights_KBGTS = jax.nn.softmax(scores_KBGTS, axis=-1).astype(values_RSH.dtype)
    weights_KBGTS = dropout(weights_KBGTS, dropout_rate, dropout_key, rows=1)
    weights_RMS = weights_KBGTS.reshape(scores_RMS.shape)
    out_RMH = jnp.einsum("RMS,RSH->RMH", weights_RMS, values_RSH)
    return out_RMH.reshape(K, B, N // K, T, H).transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


def look_into_cache(mask_BTS: jax.Array, length_B: jax.Array) -> Look:
    """Attention over a cache, after writing the new keys and values behind those it holds."""

    def look(q_BTNH, k_BTKH, v_BTKH, cache, _key):  # type: ignore[no-untyped-def]
        cache = cache.write(k_BTKH, v_BTKH, length_B)
        return attend(q_BTNH, cache.keys_RSH, cache.values_RSH, mask_BTS), cache

    return look


class Attention(nnx.Module):
    """Projections to queries, keys and values, attention over them, and the way back."""

    def __init__(self, config: ModelConfig, *, std: float, residual_std: float, rngs: nnx.Rngs):
        D, N, K, H = config.dim, config.num_heads, config.num_kv_heads, config.head_dim
        queries, keys = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.wq = Linear((D,), (N, H), queries, std=std, rngs=rngs)
        self.wk = Linear((D,), (K, H), keys, std=std, rngs=rngs)
        self.wv = Linear((D,), (K, H), keys, std=std, rngs=rngs)
        self.wo = Linear((N, H), (D,), ("heads", "head_dim", "embed"), std=residual_std, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        look: Look,
        cache: Cache = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The attention output [B, T, D], and the cache with T more slots filled if one came in."""
        q_BTNH = named("queries", rotate(self.wq(x_BTD), *rotation))
        k_BTKH = named("keys", rotate(self.wk(x_BTD), *rotation))
        v_BTKH = named("values", self.wv(x_BTD))
        mixed_BTNH, cache = look(q_BTNH, k_BTKH, v_BTKH, cache, dropout_key)
        return self.wo(mixed_BTNH), cache
