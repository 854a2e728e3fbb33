"""The key/value cache of incremental decoding: a value that goes in and comes out.

Each sequence has its own length, so prompts of different lengths share a batch.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llama_jax.config import ModelConfig
from llama_jax.kernels.attention import (
    attend,
    attend_in_chunks,
    causal_mask,
    distance_bias,
    merge_heads_and_batch,
)
from llama_jax.kernels.matmul import platform

ROW_MAJOR = Layout((0, 1, 2))
SMALLEST_CHUNK = 128  # slots that attention reads at a time, where it reads in chunks
# Of keys, and of values: 4 MiB, 5 microseconds of a v5e's memory. A larger cache is read in several
# chunks: read in one, it would be written back whole by what the TPU compiler makes of it.
CHUNK_ELEMENTS = 2**21
MOST_SCORES = 2**25  # elements, 128 MiB
SHORTEST_FOR_KERNEL = 64  # new tokens; of fewer the scores are small and fuse with what is around

AmongNew = Callable[..., tuple[jax.Array, jax.Array]]  # see `model.execution`

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
        """The positions of the next T tokens of each sequence, int32 [B, T]; or [1, T], of all."""
        return jnp.atleast_1d(self.length_B)[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    def attention(
        self, positions_BT: jax.Array, window: int = 0, among_new: AmongNew | None = None
    ) -> AttentionFunction:
        """Attention over the cache, after writing new keys and values behind those it holds.

        Args:
          among_new: see `model.execution.Execution`.
        """
        if among_new is not None:
            return self._attention_in_chunks(positions_BT, window, among_new)
        return self._attention(positions_BT, window)

    def _attention(self, positions_BT: jax.Array, window: int) -> AttentionFunction:
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

    def _attention_in_chunks(
        self, positions_BT: jax.Array, window: int, among_new: AmongNew
    ) -> AttentionFunction:
        """`_attention` that reads the filled slots only, and holds scores of few of them."""
        T, at_once = positions_BT.shape[1], self._attention(positions_BT, window)
        own_mask_BTC = causal_mask(jnp.arange(T)[None], T, window)
        kernel = kernel_among_new(among_new, T, window)

        def attention(q_BTNH, k_BTKH, v_BTKH, layer, key, slopes_N=None):  # type: ignore[no-untyped-def]
            B, _, N, H = q_BTNH.shape
            K = k_BTKH.shape[2]
            size = chunk_size(self.slots, K * B, N // K * T, H)
            if size == self.slots and kernel is None:  # the loop would only cost
                return at_once(q_BTNH, k_BTKH, v_BTKH, layer, key, slopes_N)
            empty = jax.tree.map(lambda x: jnp.zeros((K * B, T, x.shape[2]), x.dtype), layer)
            own = empty.write(k_BTKH, v_BTKH, jnp.int32(0))
            # Written before the others are read, so that XLA need not copy them.
            layer = layer.write(k_BTKH, v_BTKH, self.length_B)

            def read(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
                slots = partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=1)
                part = jax.tree.map(lambda x: slots(x, chunk * size), layer)
                return part.keys_RSH, part.values_RSH

            def mask(chunk: jax.Array) -> jax.Array:
                return chunk_mask(chunk, size, self.length_B, positions_BT, window)

            mixed_BTNH = attend_in_chunks(
                q_BTNH,
                (own.keys_RSH, own.values_RSH),
                own_mask_BTC,
                read,
                mask,
                (jnp.max(self.length_B) + size - 1) // size,
                chunk_bias(slopes_N, 0, T, positions_BT, size),
                kernel,
            )
            return mixed_BTNH, layer

        return attention

    def filled(self, layers: tuple[StoredLayer, ...], T: int) -> "KVCache":
        """The cache after T more tokens of each sequence."""
        return KVCache(layers, self.length_B + T)

    def with_slots(self, slots: int) -> "KVCache":
        """The same tokens with room for more."""
        more = ((0, 0), (0, slots - self.slots), (0, 0))
        return KVCache(jax.tree.map(lambda x: jnp.pad(x, more), self.layers), self.length_B)


def kernel_among_new(among_new: AmongNew | None, T: int, window: int) -> AmongNew | None:
    """The kernel for the attention of T new tokens to each other; None: by their mask."""
    if among_new is None or T < SHORTEST_FOR_KERNEL:
        return None
    return partial(among_new, window=window)


def chunk_size(slots: int, R: int, M: int, H: int) -> int:
    """How many of the slots to read at a time, a divisor of their number.

    Few, so that little beyond the filled part is read and scores [R, M, C] take little memory; but
    enough to be worth a turn of a loop.
    """
    wanted = max(SMALLEST_CHUNK, min(MOST_SCORES // (R * M), CHUNK_ELEMENTS // (R * H)))
    chunks = max(1, math.ceil(slots / wanted))
    while slots % chunks:
        chunks -= 1
    return slots // chunks


def chunk_mask(
    chunk: jax.Array, size: int, length_B: jax.Array, positions_BT: jax.Array, window: int
) -> jax.Array:
    """Which slots of a chunk of `size` a query attends to, [B, T, C]: filled, and in the window.

    `length_B`: how many are filled; an array without dims is the number of all sequences.
    """
    slots_C = (chunk * size + jnp.arange(size))[None, None]
    mask_BTC = slots_C < jnp.atleast_1d(length_B)[:, None, None]
    return mask_BTC & (slots_C > positions_BT[:, :, None] - window) if window else mask_BTC


def chunk_bias(
    slopes_N: jax.Array | None,
    start: jax.Array | int,
    own: int,
    positions_BT: jax.Array,
    size: int,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]] | None:
    """The bias of scores with new keys, and as a function of a chunk of `size` slots; or None.

    Args:
      start: the index among the new keys, of which there are `own`, of the first query.
    """
    if slopes_N is None:
        return None

    def of_chunk(chunk: jax.Array) -> jax.Array:
        slots_C = (chunk * size + jnp.arange(size))[None, None]
        return distance_bias(slopes_N, positions_BT[:, :, None] - slots_C)

    queries_T = start + jnp.arange(positions_BT.shape[1])
    own_distance_BTC = (queries_T[:, None] - jnp.arange(own)[None])[None]
    return distance_bias(slopes_N, own_distance_BTC), of_chunk


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
