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
    """Keys [R, S, H] and values [R, H, S] of one layer; R = K·B, the rows of each kv head in turn.

    They lie exactly as attention's two products read them, a score along H and an output along S.
    In any other arrangement XLA copies or turns round the whole cache for every token it decodes.
    """

    keys_RSH: jax.Array
    values_RHS: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array, at_B: jax.Array) -> "LayerCache":
        """This cache with T new slots of each row filled, beginning at that row's `at_B`."""
        return LayerCache(
            _write_rows(self.keys_RSH, keys_BTKH.transpose(2, 0, 1, 3), at_B, slots_dim=0),
            _write_rows(self.values_RHS, values_BTKH.transpose(2, 0, 3, 1), at_B, slots_dim=1),
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
        layers = [LayerCache(zeros((R, S, H)), zeros((R, H, S))) for _ in range(config.num_layers)]
        return cls(tuple(layers), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """Tokens that fit in a row."""
        return self.layers[0].keys_RSH.shape[1]


def _write_rows(old: jax.Array, new_KB: jax.Array, at_B: jax.Array, slots_dim: int) -> jax.Array:
    """`old` [R, …] with `new` [K, B, …] written in each row from its own slot on."""
    K, B, new_KB = *new_KB.shape[:2], new_KB.astype(old.dtype)
    if B == 1:  # one row needs no scatter
        return jax.lax.dynamic_update_slice_in_dim(old, new_KB[:, 0], at_B[0], 1 + slots_dim)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=slots_dim)
    of_heads = jax.vmap(jax.vmap(write), in_axes=(0, 0, None))
    return of_heads(old.reshape(K, B, *old.shape[1:]), new_KB, at_B).reshape(old.shape)
