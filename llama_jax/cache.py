"""The key/value cache of incremental decoding: a value that goes in and comes out.

Each row has its own length, so prompts of different lengths share a batch. The cache knows where
things lie, not what they mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [B, K, S, H]: rows of a head are contiguous to read."""

    keys_BKSH: jax.Array
    values_BKSH: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array, at_B: jax.Array) -> "LayerCache":
        """This cache with T new slots of each row filled, beginning at that row's `at_B`."""
        return LayerCache(
            _write_rows(self.keys_BKSH, keys_BTKH, at_B),
            _write_rows(self.values_BKSH, values_BTKH, at_B),
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
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        zeros = [jnp.zeros(shape, config.compute_dtype) for _ in range(2 * config.num_layers)]
        layers = tuple(LayerCache(k, v) for k, v in zip(zeros[::2], zeros[1::2]))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """Tokens that fit in a row."""
        return self.layers[0].keys_BKSH.shape[2]


def _write_rows(cache_BKSH: jax.Array, new_BTKH: jax.Array, at_B: jax.Array) -> jax.Array:
    """`cache` with `new` written along S, in each row from its own slot on."""
    new_BKTH = new_BTKH.swapaxes(1, 2).astype(cache_BKSH.dtype)
    if new_BKTH.shape[0] == 1:  # one row needs no scatter
        return jax.lax.dynamic_update_slice(cache_BKSH, new_BKTH, (0, 0, at_B[0], 0))
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
    return write(cache_BKSH, new_BKTH, at_B)
