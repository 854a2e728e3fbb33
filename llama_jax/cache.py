"""The key/value cache of incremental decoding: a value that goes in and comes out.

Each row has its own length, so prompts of different lengths share a batch. The cache knows where
things lie, not what they mean.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [R, S, H]; R = K·B, the rows of each kv head in turn.

    They lie exactly as attention's two products read them, batch dims merged. With B and K apart,
    XLA on CPU copied the whole cache for every token it decoded.
    """

    keys_RSH: jax.Array
    values_RSH: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array, at_B: jax.Array) -> "LayerCache":
        """This cache with T new slots of each row filled, beginning at that row's `at_B`."""
        return LayerCache(
            _write_rows(self.keys_RSH, keys_BTKH, at_B),
            _write_rows(self.values_RSH, values_BTKH, at_B),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One `LayerCache` a layer, and how many slots of each row hold a token."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "KVCache":
        """Room for `slots` tokens of each of `batch` rows, in the model's compute dtype."""
        R, S, H = config.num_kv_heads * batch, slots, config.head_dim
        zeros = partial(jnp.zeros, dtype=config.compute_dtype)
        layers = [LayerCache(zeros((R, S, H)), zeros((R, S, H))) for _ in range(config.num_layers)]
        return cls(tuple(layers), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """Tokens that fit in a row."""
        return self.layers[0].keys_RSH.shape[1]


def merged_rows(x_BTKH: jax.Array) -> jax.Array:
    """Keys or values of some positions as a cache holds them, [R, T, H]."""
    B, T, K, H = x_BTKH.shape
    return x_BTKH.transpose(2, 0, 1, 3).reshape(K * B, T, H)


def _write_rows(old_RSH: jax.Array, new_BTKH: jax.Array, at_B: jax.Array) -> jax.Array:
    """`old` with `new` written along S, in each row from its own slot on."""
    B, _, K, _ = new_BTKH.shape
    new_RTH = merged_rows(new_BTKH.astype(old_RSH.dtype))
    if B == 1:  # one row needs no scatter
        return jax.lax.dynamic_update_slice_in_dim(old_RSH, new_RTH, at_B[0], axis=1)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(write)(old_RSH, new_RTH, jnp.tile(at_B, K))
