"""Grouped-query attention (Ainslie et al. 2023): N query heads share K heads of keys and values."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.kernels.attention import attend, causal_mask
from llama_jax.model.cache import Int8LayerCache, KVCache, LayerCache
from llama_jax.model.layers import Linear
from llama_jax.model.positions import rotate

Cache = LayerCache | Int8LayerCache | None

# (q_BTNH, k_BTKH, v_BTKH, the layer's cache or None, dropout key or None) -> (what is attended to,
# [B, T, N, H]; the updated cache). `Llama.hidden` makes one that all blocks share.
AttentionFunction = Callable[
    [jax.Array, jax.Array, jax.Array, Cache, jax.Array | None], tuple[jax.Array, Cache]
]


def update_cache_and_attend(cache: KVCache, positions_BT: jax.Array) -> AttentionFunction:
    """Attention over a cache, after writing the new keys and values behind those it holds."""
    mask_BTS, start_B = causal_mask(positions_BT, cache.slots), cache.length_B

    def attention(q_BTNH, k_BTKH, v_BTKH, layer, _key):  # type: ignore[no-untyped-def]
        layer = layer.write(k_BTKH, v_BTKH, start_B)
        return attend(q_BTNH, layer.keys_RSH, layer.values_RSH, mask_BTS), layer

    return attention


class Attention(nnx.Module):
    """Projections to queries, keys and values, attention over them, and the output projection."""

    def __init__(self, config: ModelConfig, *, std: float, residual_std: float, rngs: nnx.Rngs):
        D, N, K, H = config.dim, config.num_heads, config.num_kv_heads, config.head_size
        queries, keys = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.wq = Linear((D,), (N, H), queries, std=std, rngs=rngs)
        self.wk = Linear((D,), (K, H), keys, std=std, rngs=rngs)
        self.wv = Linear((D,), (K, H), keys, std=std, rngs=rngs)
        self.wo = Linear((N, H), (D,), ("heads", "head_dim", "embed"), std=residual_std, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        attention: AttentionFunction,
        cache: Cache = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The output [B, T, D], and the cache with T more slots filled if one came in."""
        # The names are what rematerialisation policies keep; see `model.execution`.
        q_BTNH = checkpoint_name(rotate(self.wq(x_BTD), *rotary), "queries")
        k_BTKH = checkpoint_name(rotate(self.wk(x_BTD), *rotary), "keys")
        v_BTKH = checkpoint_name(self.wv(x_BTD), "values")
        mixed_BTNH, cache = attention(q_BTNH, k_BTKH, v_BTKH, cache, dropout_key)
        return self.wo(mixed_BTNH), cache
