"""Grouped-query attention (Ainslie et al. 2023): queries in N heads share K heads of keys.

Masks are boolean, True where a query may look. Attention does not know where its cache is kept.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.blockwise import causal_attention
from llama_jax.cache import LayerCache
from llama_jax.config import ModelConfig
from llama_jax.layers import Linear, dropout
from llama_jax.positions import rotate


def causal_mask(positions_BT: jax.Array, key_length: int) -> jax.Array:
    """[B, T, S]: True where slot s holds a token at or before the query's position."""
    return jnp.arange(key_length)[None, None] <= positions_BT[:, :, None]


def attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_BTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, [B, T, N, H], with float32 scores; each kv head serves N/K heads."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
    ) * (1.0 / math.sqrt(H))
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    weights_BKGTS = dropout(weights_BKGTS, dropout_rate, dropout_key)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH).reshape(B, T, N, H)


def prefers_blocks() -> bool:
    """Whether whole sequences are attended to block by block: on CPU, where that is far faster."""
    return jax.default_backend() == "cpu"


class Attention(nnx.Module):
    """Projections to queries, keys and values, attention over them, and the way back."""

    def __init__(self, config: ModelConfig, *, std: float, residual_std: float, rngs: nnx.Rngs):
        D, N, K, H = config.dim, config.num_heads, config.num_kv_heads, config.head_dim
        queries, keys = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.wq = Linear((D,), (N, H), queries, std=std, rngs=rngs)
        self.wk = Linear((D,), (K, H), keys, std=std, rngs=rngs)
        self.wv = Linear((D,), (K, H), keys, std=std, rngs=rngs)
        self.wo = Linear((N, H), (D,), ("heads", "head_dim", "embed"), std=residual_std, rngs=rngs)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        mask_BTS: jax.Array,
        cache: LayerCache | None,
        length_B: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The attention output [B, T, D], and the cache with T more slots filled if one came in."""
        q_BTNH = rotate(self.wq(x_BTD), *rotation)
        k_BTKH = rotate(self.wk(x_BTD), *rotation)
        v_BTKH = self.wv(x_BTD)
        if cache is None and dropout_key is None and prefers_blocks():
            return self.wo(causal_attention(q_BTNH, k_BTKH, v_BTKH)), None
        if cache is None or length_B is None:
            k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        else:
            cache = cache.write(k_BTKH, v_BTKH, length_B)
            k_BKSH, v_BKSH = cache.keys_BKSH, cache.values_BKSH
        mixed_BTNH = attend(q_BTNH, k_BKSH, v_BKSH, mask_BTS, self.dropout_rate, dropout_key)
        return self.wo(mixed_BTNH), cache
