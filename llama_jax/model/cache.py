"""The key/value cache of incremental decoding: a value that goes in and comes out.

Each sequence has its own length, so prompts of different lengths share a batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llama_jax.config import ModelConfig
from llama_jax.kernels.attention import (
    attend,
    causal_mask,
    distance_bias,
    merge_heads_and_batch,
)
from llama_jax.kernels.matmul import platform

ROW_MAJOR = Layout((0, 1, 2))

# (q_BTNH, k_BTKH, v_BTKH, the layer's cache or None, dropout key or None, slopes_N or None) -> (the
# mixed values [B, T, N, H], the updated cache). `Llama.hidden` makes one that all blocks share.
AttentionFunction = Callable[
    [jax.Array, jax.Array, jax.Array, Any, jax.Array | None, jax.Array | None],
    tuple[jax.Array, Any],
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, [R, S, H]; R = K·B, heads outermost.

    This is the layout that attention's two matmuls read, batch dims merged. With B and K apart, XLA
    on CPU copied the whole cache for every decoded token.
    """

    keys_RSH: jax.Array
    values_RSH: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array, at_B: jax.Array) -> "LayerCache":
        """This cache with T more slots of each sequence filled, from its slot `at_B` on.

        An `at_B` without dims is the slot of all sequences.
        """
        return LayerCache(
            _write(self.keys_RSH, keys_BTKH, at_B),
            _write(self.values_RSH, values_BTKH, at_B),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8LayerCache:
    """A layer's cache in a fourth of float32's memory: int8, with a scale for each vector of H.

    The same interface as `LayerCache`; keys and values are dequantised where attention reads them.
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
        """This cache with T more slots of each sequence filled, from its slot `at_B` on."""
        keys, key_scales = _quantized(keys_BTKH)
        values, value_scales = _quantized(values_BTKH)
        return Int8LayerCache(
            _write(self.keys_int8_RSH, keys, at_B),
            _write(self.key_scales_RS1, key_scales, at_B),
            _write(self.values_int8_RSH, values, at_B),
            _write(self.value_scales_RS1, value_scales, at_B),
        )


def _quantized(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Int8 values and their scales [B, T, K, 1]."""
    scale_BTK1 = jnp.max(jnp.abs(x_BTKH), axis=-1, keepdims=True) / 127
    rounded_BTKH = jnp.round(x_BTKH / jnp.where(scale_BTK1 > 0, scale_BTK1, 1))
    return rounded_BTKH.astype(jnp.int8), scale_BTK1


StoredLayer = LayerCache | Int8LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of every layer, and how many slots of each sequence hold a token."""

    layers: tuple[StoredLayer, ...]
    length_B: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype: str = "") -> "KVCache":
        """An empty cache for `batch` sequences of up to `slots` tokens.

        `dtype` "int8" makes `Int8LayerCache`s; "" uses the model's compute dtype.
        """
        R, S, H = config.num_kv_heads * batch, slots, config.head_size
        zeros = partial(jnp.zeros, dtype=config.compute_dtype)

        def layer() -> StoredLayer:
            if dtype != "int8":
                return LayerCache(zeros((R, S, H)), zeros((R, S, H)))
            parts = [(jnp.zeros((R, S, H), jnp.int8), zeros((R, S, 1))) for _ in range(2)]
            return Int8LayerCache(*parts[0], *parts[1])

        layers = tuple(layer() for _ in range(config.num_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """Tokens that a sequence has room for."""
        return jax.tree.leaves(self.layers)[0].shape[1]

    def positions(self, T: int) -> jax.Array:
        """The positions of the next T tokens of each sequence, int32 [B, T]."""
        return self.length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    def attention(self, positions_BT: jax.Array, window: int = 0) -> AttentionFunction:
        """Attention over the cache, after writing new keys and values behind those it holds."""
        mask_BTS = causal_mask(positions_BT, self.slots, window)

        def attention(q_BTNH, k_BTKH, v_BTKH, layer, _key, slopes_N=None):  # type: ignore[no-untyped-def]
            layer = layer.write(k_BTKH, v_BTKH, self.length_B)
            bias_NBTS = None
            if slopes_N is not None:
                distance_BTS = positions_BT[:, :, None] - jnp.arange(self.slots)[None, None]
                bias_NBTS = distance_bias(slopes_N, distance_BTS)
            keys_RSH, values_RSH = layer.keys_RSH, layer.values_RSH
            return attend(q_BTNH, keys_RSH, values_RSH, mask_BTS, bias_NBTS=bias_NBTS), layer

        return attention

    def filled(self, layers: tuple[StoredLayer, ...], T: int) -> "KVCache":
        """The cache after T more tokens of each sequence."""
        return KVCache(layers, self.length_B + T)

    def with_slots(self, slots: int) -> "KVCache":
        """The same tokens with room for more."""
        more = ((0, 0), (0, slots - self.slots), (0, 0))
        return KVCache(jax.tree.map(lambda x: jnp.pad(x, more), self.layers), self.length_B)


def _write(old_RSH: jax.Array, new_BTKH: jax.Array, at_B: jax.Array) -> jax.Array:
    """`old` with `new` written along S, in each sequence from its own slot on."""
    B, _, K, _ = new_BTKH.shape
    new_RTH = merge_heads_and_batch(new_BTKH.astype(old_RSH.dtype))
    if not at_B.ndim or B == 1:  # one place needs no scatter
        return jax.lax.dynamic_update_slice_in_dim(old_RSH, new_RTH, at_B.reshape(-1)[0], axis=1)
    if platform() != "tpu":
        write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        return jax.vmap(write)(old_RSH, new_RTH, jnp.tile(at_B, K))
    # That is a scatter, of which the TPU compiler makes a loop over all R. So one sequence after
    # the other; and in the layout that attention reads, else it would copy the cache for each step.
    old_KBSH, new_KBTH = (x.reshape(K, B, *x.shape[1:]) for x in (old_RSH, new_RTH))
    for b in range(B):
        place = (0, b, at_B[b], 0)
        old_KBSH = jax.lax.dynamic_update_slice(old_KBSH, new_KBTH[:, b : b + 1], place)
    return with_layout_constraint(old_KBSH.reshape(old_RSH.shape), ROW_MAJOR)
