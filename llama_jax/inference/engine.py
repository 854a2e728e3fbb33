"""Token ids from a model: prompts are read into a cache, then a loop on the device goes on.

The host sees tokens a chunk at a time, for streaming. Prompts of different lengths share a batch:
each row has its own cache length, key and end. Text is not known here.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.distributed.mesh import partition_spec, steps_on_mesh
from llama_jax.errors import UserError, whole_number
from llama_jax.inference.decode import (
    CHUNK,
    NOTHING,
    Chosen,
    Chunk,
    GenerationState,
    begin,
    chunk_of,
    decode,
)
from llama_jax.inference.prefill import WITH_CACHE, padded, read_prompts, slots_for, stretches
from llama_jax.inference.sampler import Sampler, TokenCounts
from llama_jax.inference.speculation import GUESSES, decode_guessing, require_plainly_greedy
from llama_jax.model.cache import KVCache
from llama_jax.model.transformer import Llama


class Engine:
    """A model that generates, and remembers its last single conversation.

    A lone prompt that begins like the one before, as a chat's next turn does, is read only from
    where it differs: the cache of the earlier call is taken up again.

    Threads may call one engine at the same time. Each call has a cache of its own, and only one of
    them takes up the earlier call's; what they make does not depend on which. The iterator that a
    call returns is for one thread at a time.
    """

    def __init__(self, model: Llama, cache_dtype: str = "", mesh: Mesh | None = None):
        """An engine around an unstacked model.

        Args:
          cache_dtype: "int8" keeps a cache a fourth the size of float32's, "" one in the model's
            compute dtype.
          mesh: what the model's arrays are cut over, if they are.
        """
        self.model, self.cache_dtype, self.mesh = model, cache_dtype, mesh
        self._kept: tuple[list[int], KVCache] | None = None
        self._taking = threading.Lock()

    @steps_on_mesh
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        *,
        max_tokens: int,
        seeds: Sequence[int],
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        speculate: bool = False,
    ) -> Iterator[Chunk]:
        """Continuations of prompts of token ids, chunk by chunk as the loop makes them.

        A row depends on its prompt and seed only, never on its neighbours. A row ends after
        `max_tokens`, or earlier at a stop id or where the model's context is full.

        Args:
          prompts: at least one id each.
          max_tokens: new tokens a row, at least 1.
          seeds: one a row.
          stop_ids: ids that end a row; they are not returned.
          logprobs: how many of the likeliest tokens to tell of beside each; None: tell nothing.
          speculate: guess ahead (see `speculation`); only for a plain greedy sampler.

        Raises:
          UserError: when a prompt is empty or leaves no room for one token in the context, the
            vocabulary has not so many tokens to tell of, or a speculating sampler is not plainly
            greedy.
        """
        self.check(prompts, sampler, logprobs, speculate)
        context = self.model.config.context_length
        length_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
        limit_B = np.minimum(length_B + min(max_tokens, context), context)
        cache, logits_BV = self._read(prompts, int(limit_B.max()) + (GUESSES + 1) * speculate)
        stops_S = np.asarray([*stop_ids, NOTHING], np.int32)
        keys_B = _keys(np.asarray(seeds, np.uint32))
        vocab_size = self.model.config.vocab_size
        counts = TokenCounts.of(prompts, vocab_size) if sampler.needs_counts else None
        state = GenerationState(
            cache,
            jnp.asarray(length_B),
            jnp.zeros(len(prompts), bool),
            jnp.asarray(limit_B),
            keys_B,
            counts,
        )
        state, chosen = _begin(state, logits_BV, sampler, stops_S, logprobs)
        new: list[list[int]] = [[] for _ in prompts]
        history = _history(prompts, chosen, cache.slots) if speculate else None
        try:
            while True:
                chunk = chunk_of(chosen, state)
                for row, ids in zip(new, chunk.rows):
                    row += ids
                yield chunk
                if all(chunk.finished):
                    return
                if history is None:
                    state, chosen = decode(self.model, state, sampler, stops_S, logprobs)
                else:
                    state, history, ids_BW = decode_guessing(self.model, state, history, stops_S)
                    chosen = Chosen(ids_BW, None)
        finally:
            # An interrupt may have come after the state was donated and before the next was here.
            if len(prompts) == 1 and not state.cache.length_B.is_deleted():
                whole = [*prompts[0], *new[0]][: int(state.cache.length_B[0])]
                self._kept = whole, state.cache

    @steps_on_mesh
    def generate_on_host(
        self,
        prompt: Sequence[int],
        choose: Callable[[np.ndarray], int],
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Chunk]:
        """One continuation whose tokens the host chooses from float32 logits [V], one at a time.

        Slow, and therefore only for choosers that cannot be told as a `Sampler`.

        Raises:
          UserError: when the prompt is empty or leaves no room for one token in the context.
        """
        self._check_lengths([prompt])
        limit = min(len(prompt) + max_tokens, self.model.config.context_length)
        cache, logits_BV = self._read([prompt], limit)
        for length in range(len(prompt) + 1, limit + 1):
            token = choose(np.asarray(logits_BV)[0])
            if token in stop_ids:
                yield Chunk([[]], ["stop"], [[]])
                return
            yield Chunk([[token]], ["length" if length == limit else ""], [[]])
            logits_BV, cache = _one(self.model, jnp.full((1, 1), token, jnp.int32), cache)

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        context = self.model.config.context_length
        for prompt in prompts:
            if not 0 < len(prompt) < context:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens; expected 1 to {context - 1}, since the"
                    f" model's context holds {context}"
                )

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        sampler: Sampler,
        logprobs: int | None = None,
        speculate: bool = False,
    ) -> None:
        """Raise what `generate` would, which raises only once its first chunk is asked for."""
        self._check_lengths(prompts)
        most = self.model.config.vocab_size
        sampler.require_ids_below(most)
        if logprobs is not None:
            whole_number("logprobs", logprobs, lambda n: 0 <= n <= most, f"0 to {most}")
        if speculate:
            require_plainly_greedy(sampler, logprobs)

    def _read(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[KVCache, jax.Array]:
        """A cache with the prompts in it and room for `tokens`, and the logits after them."""
        start, cache = self._take_kept(prompts)
        room = max(tokens, start + sum(stretches(max(map(len, prompts)) - start)))
        slots = slots_for(room)
        if cache is None:
            cache = KVCache.empty(self.model.config, len(prompts), slots, self.cache_dtype)
            cache = _cut(cache, self.mesh)
        elif cache.slots < slots:
            cache = cache.with_slots(slots)
        return read_prompts(self.model, cache, prompts, start)

    def _take_kept(self, prompts: Sequence[Sequence[int]]) -> tuple[int, KVCache | None]:
        """The kept cache, and how many ids of a lone prompt it holds; (0, None) if of no use.

        Either way it is not kept any longer: its memory goes to the new call.
        """
        with self._taking:  # two calls that had one cache would donate it twice
            kept, self._kept = self._kept, None
        if kept is None or len(prompts) > 1:
            return 0, None
        ids, cache = kept
        start = _common(ids, prompts[0])
        return (start, cache) if start else (0, None)


_keys = jax.jit(jax.vmap(jax.random.key))
_begin = partial(jax.jit, donate_argnames="state", static_argnames="logprobs")(begin)


@partial(jax.jit, donate_argnames="cache")
def _one(model: Llama, token_B1: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """The logits [B, V] after one more token, and the cache with it."""
    logits_B1V, filled = model(token_B1, cache, execution=WITH_CACHE)
    assert filled is not None
    return logits_B1V[:, 0], filled


def _cut(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """A cache of which each device has its own kv heads."""
    if mesh is None:
        return cache

    def cut(array: jax.Array) -> jax.Array:  # R is kv heads times rows
        spec = partition_spec(("kv_heads", "length", "head_dim"), array.shape, mesh)
        return jax.device_put(array, NamedSharding(mesh, spec))

    return dataclasses.replace(cache, layers=jax.tree.map(cut, cache.layers))


def _common(kept: Sequence[int], prompt: Sequence[int]) -> int:
    """Ids that two sequences begin with alike, at most all but the last of the prompt."""
    most = min(len(kept), len(prompt) - 1)
    return next((i for i in range(most) if kept[i] != prompt[i]), most)


def _history(prompts: Sequence[Sequence[int]], chosen: Chosen, slots: int) -> jax.Array:
    """The ids so far of each row, the first chosen one included."""
    rows = [[*ids, max(int(first), 0)] for ids, first in zip(prompts, np.asarray(chosen.token))]
    return jnp.asarray(padded(rows, slots + CHUNK + GUESSES + 1))
