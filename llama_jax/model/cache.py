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
class Int8LayerCache:
    """A layer's cache in a fourth of float32's memory: int8, with a scale for each vector of H.

    It has `LayerCache`'s face; keys and values are made floats again where attention reads them.
    """

    keys_int8_RSH: jax.Array
    key_scales_RS1: jax.Array
    values_int8_RSH: jax.Array
    value_scales_RS1: jax.Array

    @property
    def keys_RSH(self) -> jax.Array:
        """The keys, in the dtype of the scales."""
        return self.keys_int8_RSH.astype(self.key_scales_RS1.dtype) * self.key_scales_RS1

    @property
    def values_RSH(self) -> jax.Array:
        """The values, in the dtype of the scales."""
        return self.values_int8_RSH.astype(self.value_scales_RS1.dtype) * self.value_scales_RS1

    def write(
        self, keys_BTKH: jax.Array, values_BTKH: jax.Array, at_B: jax.Array
    ) -> "Int8LayerCache":
        """This cache with T new slots of each row filled, beginning at that row's `at_B`."""
        keys, key_scales = _quantized(keys_BTKH)
        values, value_scales = _quantized(values_BTKH)
        return Int8LayerCache(
            _write_rows(self.keys_int8_RSH, keys, at_B),
            _write_rows(self.key_scales_RS1, key_scales, at_B),
            _write_rows(self.values_int8_RSH, values, at_B),
            _write_rows(self.value_scales_RS1, value_scales, at_B),
        )


def _quantized(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Int8 numbers and the scales [B, T, K, 1] that give them their size back."""
    scale_BTK1 = jnp.max(jnp.abs(x_BTKH), axis=-1, keepdims=True) / 127
    whole_BTKH = jnp.round(x_BTKH / jnp.where(scale_BTK1 > 0, scale_BTK1, 1))
    return whole_BTKH.astype(jnp.int8), scale_BTK1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One layer's cache after the other, and how many slots of each row hold a token."""

    layers: tuple[LayerCache | Int8LayerCache, ...]
    length_B: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: str = "") -> "KVCache":
        """Room for `slots` tokens of each of `batch` rows.

        `dtype` "int8" keeps `Int8LayerCache`s; "" keeps the model's compute dtype.
        """
        R, S, H = config.num_kv_heads * batch, slots, config.head_dim
        zeros = partial(jnp.zeros, dtype=config.compute_dtype)

        def layer() -> LayerCache | Int8LayerCache:
            if dtype != "int8":
                return LayerCache(zeros((R, S, H)), zeros((R, S, H)))
            parts = [(jnp.zeros((R, S, H), jnp.int8), zeros((R, S, 1))) for _ in range(2)]
            return Int8LayerCache(*parts[0], *parts[1])

        layers = tuple(layer() for _ in range(config.num_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """Tokens that fit in a row."""
        return jax.tree.leaves(self.layers)[0].shape[1]

    def with_slots(self, slots: int) -> "KVCache":
        """The same tokens with room for more."""
        more = ((0, 0), (0, slots - self.slots), (0, 0))
        return KVCache(jax.tree.map(lambda x: jnp.pad(x, more), self.layers), self.length_B)


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
