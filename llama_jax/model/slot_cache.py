"""A key/value cache for sequences that come and go: continuous batching.

Each sequence of the batch has a slot. What a slot holds is in two places: `stored`, by position,
and `recent`, the tokens of the running block of decode steps. All slots write step i of a block at
index i of `recent`, so that a step is one `dynamic_update_slice` for the whole batch and not a
scatter, which is slow on TPU. At the end of a block `flush` moves the tokens to their positions.

Attention reads `stored` in chunks up to the longest active sequence, so that one program serves all
lengths. A chunk beyond a sequence's own length changes none of its bits: a sequence does not
depend on its neighbours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.kernels.attention import attend_in_chunks, causal_mask
from llama_jax.model.cache import (
    AmongNew,
    AttentionFunction,
    KVCache,
    StoredLayer,
    chunk_bias,
    chunk_mask,
    kernel_among_new,
)

BLOCK = 16  # decode steps at most before `flush`
CHUNK = 128  # stored tokens that attention reads at a time; of 64 to 512 the fastest on CPU


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotLayer:
    """One layer's keys and values: `stored` [K, B, S, H] and `recent` [K·B, `BLOCK`, H].

    `stored` has its own dim for slots: with K and B merged, XLA on CPU copied all of it wherever a
    slot was written.
    """

    stored: StoredLayer
    recent: StoredLayer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """The cache of a batch while it is decoded, one token of every sequence a step."""

    layers: tuple[SlotLayer, ...]
    stored_B: jax.Array  # tokens of each slot that are in `stored`
    length_B: jax.Array  # the same with those in `recent`
    num_recent: jax.Array  # steps since the last flush

    @classmethod
    def empty(cls, config: ModelConfig, slots: int, tokens: int, dtype: str = "") -> "SlotCache":
        """Return an empty cache for sequences of up to `tokens` tokens; `dtype` as for `KVCache`.

        Each slot has room for a block more, where a slot that is not active is written to.
        """
        size = -(-(tokens + BLOCK) // CHUNK) * CHUNK
        stored = jax.tree.map(
            lambda x: x.reshape(-1, slots, *x.shape[1:]),
            KVCache.empty(config, slots, size, dtype).layers,
        )
        recent = KVCache.empty(config, slots, BLOCK, dtype).layers
        layers = tuple(SlotLayer(*layer) for layer in zip(stored, recent))
        return cls(layers, *(jnp.zeros(shape, jnp.int32) for shape in (slots, slots, ())))

    @property
    def slots(self) -> int:
        """Sequences that are decoded together."""
        return self.length_B.shape[0]

    @property
    def size(self) -> int:
        """Tokens that a slot has room for."""
        return jax.tree.leaves(self.layers)[0].shape[2]

    def positions(self, T: int) -> jax.Array:
        """Return the position of each slot's next token, int32 [B, 1]; T must be 1."""
        assert T == 1, "slots are decoded one token a step"
        return (self.stored_B + self.num_recent)[:, None]

    def attention(
        self, positions_BT: jax.Array, window: int, among_new: AmongNew | None = None
    ) -> AttentionFunction:
        """Return attention over all tokens so far, which adds the new one to `recent`."""
        chunks = _num_chunks(self.stored_B.max())
        recent_mask_BTC = causal_mask(self.num_recent[None, None], BLOCK, window)

        def stored_mask(chunk: jax.Array) -> jax.Array:
            return chunk_mask(chunk, CHUNK, self.stored_B, positions_BT, window)

        def attention(q_BTNH, k_BTKH, v_BTKH, layer, _key, slopes_N=None):  # type: ignore[no-untyped-def]
            bias = chunk_bias(slopes_N, self.num_recent, BLOCK, positions_BT, CHUNK)
            recent = layer.recent.write(k_BTKH, v_BTKH, self.num_recent)

            def read(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
                return _pair(jax.tree.map(lambda x: _read(x, chunk), layer.stored))

            mixed_BTNH = attend_in_chunks(
                q_BTNH, _pair(recent), recent_mask_BTC, read, stored_mask, chunks, bias
            )
            return mixed_BTNH, SlotLayer(layer.stored, recent)

        return attention

    def filled(self, layers: tuple[SlotLayer, ...], T: int) -> "SlotCache":
        """Return the cache after T more tokens of each sequence."""
        return SlotCache(layers, self.stored_B, self.length_B + T, self.num_recent + T)

    def flush(self, active_B: jax.Array) -> "SlotCache":
        """Return the cache with the recent tokens of active slots in `stored`.

        Of those, only the first `length_B - stored_B` belong to the sequence. The others lie beyond
        its length, where they are not read before they are overwritten.
        """
        nowhere = self.size - BLOCK
        at_B = jnp.where(active_B, self.stored_B, nowhere)

        def store(slot: jax.Array, layers: tuple[SlotLayer, ...]) -> tuple[SlotLayer, ...]:
            def move(stored_KBSH: jax.Array, recent_RCH: jax.Array) -> jax.Array:
                recent_KBCH = recent_RCH.reshape(*stored_KBSH.shape[:2], *recent_RCH.shape[1:])
                recent_KCH = _read_slot(recent_KBCH, slot, jnp.int32(0), BLOCK)
                return _write_slot(stored_KBSH, recent_KCH, slot, at_B[slot])

            return tuple(
                SlotLayer(jax.tree.map(move, layer.stored, layer.recent), layer.recent)
                for layer in layers
            )

        layers = jax.lax.fori_loop(0, self.slots, store, self.layers)
        return SlotCache(layers, self.length_B, self.length_B, jnp.int32(0))

    def copy(self, source: jax.Array, target: jax.Array, length: jax.Array) -> "SlotCache":
        """Return the cache with the first `length` stored tokens of one slot in another, too."""

        def copy_chunk(chunk: jax.Array, layers: tuple[SlotLayer, ...]) -> tuple[SlotLayer, ...]:
            def copy(stored_KBSH: jax.Array) -> jax.Array:
                tokens_KCH = _read_slot(stored_KBSH, source, chunk * CHUNK, CHUNK)
                return _write_slot(stored_KBSH, tokens_KCH, target, chunk * CHUNK)

            return tuple(
                SlotLayer(jax.tree.map(copy, layer.stored), layer.recent) for layer in layers
            )

        layers = jax.lax.fori_loop(0, _num_chunks(length), copy_chunk, self.layers)
        return dataclasses.replace(self, layers=layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneSlot:
    """One slot of a `SlotCache`, to which tokens are added where they belong.

    For a prompt, which is read in chunks, and for a sequence that is decoded alone.
    """

    layers: tuple[SlotLayer, ...]
    slot: jax.Array
    length_B: jax.Array  # tokens that the slot has, [1]

    def positions(self, T: int) -> jax.Array:
        """Return the positions of the next T tokens, int32 [1, T]."""
        return self.length_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    def attention(
        self, positions_BT: jax.Array, window: int, among_new: AmongNew | None = None
    ) -> AttentionFunction:
        """Return attention over the stored tokens and the new ones, which it stores."""
        T = positions_BT.shape[1]
        own_mask_BTC = causal_mask(jnp.arange(T)[None], T, window)
        kernel = kernel_among_new(among_new, T, window)

        def stored_mask(chunk: jax.Array) -> jax.Array:
            return chunk_mask(chunk, CHUNK, self.length_B, positions_BT, window)

        def attention(q_BTNH, k_BTKH, v_BTKH, layer, _key, slopes_N=None):  # type: ignore[no-untyped-def]
            bias = chunk_bias(slopes_N, 0, T, positions_BT, CHUNK)
            empty = jax.tree.map(
                lambda x: jnp.zeros((x.shape[0], T, x.shape[3]), x.dtype), layer.stored
            )
            own = empty.write(k_BTKH, v_BTKH, jnp.int32(0))
            # Written before the others are read, so that XLA need not copy them.
            at = (self.slot, self.length_B[0])
            stored = jax.tree.map(lambda old, new: _write_slot(old, new, *at), layer.stored, own)

            def read(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
                at = (self.slot, chunk * CHUNK, CHUNK)
                return _pair(jax.tree.map(lambda x: _read_slot(x, *at), stored))

            chunks = _num_chunks(self.length_B[0])
            mixed_BTNH = attend_in_chunks(
                q_BTNH, _pair(own), own_mask_BTC, read, stored_mask, chunks, bias, kernel
            )
            return mixed_BTNH, SlotLayer(stored, layer.recent)

        return attention

    def filled(self, layers: tuple[SlotLayer, ...], T: int) -> "OneSlot":
        """Return the slot with T more tokens."""
        return OneSlot(layers, self.slot, self.length_B + T)


def _num_chunks(tokens: jax.Array) -> jax.Array:
    return (tokens + CHUNK - 1) // CHUNK


def _pair(layer: StoredLayer) -> tuple[jax.Array, jax.Array]:
    return layer.keys_RSH, layer.values_RSH


def _read(array_KBSH: jax.Array, chunk: jax.Array) -> jax.Array:
    """Return a chunk of tokens of all slots, [R, C, H]."""
    chunk_KBCH = jax.lax.dynamic_slice_in_dim(array_KBSH, chunk * CHUNK, CHUNK, axis=2)
    return chunk_KBCH.reshape(-1, *chunk_KBCH.shape[2:])


def _read_slot(array_KBSH: jax.Array, slot: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """Return `length` tokens of one slot, [K, length, H]."""
    K, _, _, H = array_KBSH.shape
    return jax.lax.dynamic_slice(array_KBSH, (0, slot, start, 0), (K, 1, length, H))[:, 0]


def _write_slot(
    array_KBSH: jax.Array, tokens_KCH: jax.Array, slot: jax.Array, start: jax.Array
) -> jax.Array:
    """Return the array with tokens of one slot written from `start` on."""
    return jax.lax.dynamic_update_slice(array_KBSH, tokens_KCH[:, None], (0, slot, start, 0))
