"""The engine: runs a request on a model and returns its tokens as they are made.

Prompts of different lengths and different sampling parameters share a batch: each sequence has its
own cache length, key and limit.
"""

import dataclasses
import threading
from collections.abc import Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.distributed.mesh import iterate_on_mesh, on_mesh
from llama_jax.errors import UsageError, UserError
from llama_jax.inference.constraints import Constraint, masks
from llama_jax.inference.decode import (
    DECODE_CHUNK,
    NO_TOKEN,
    GenerationState,
    Tokens,
    are_done,
    cache_slots,
    common_prefix,
    decode,
    decode_one,
    decoding_execution,
    empty_cache,
    pad_sequences,
    prefill,
    prefill_chunks,
    sample_first_token,
)
from llama_jax.inference.request import Delta, Request
from llama_jax.inference.sampler import Sampler, TokenCounts
from llama_jax.inference.speculation import NUM_GUESSES, decode_speculating
from llama_jax.inference.xorshift import XorshiftSampler
from llama_jax.model.cache import KVCache
from llama_jax.model.transformer import Llama
from llama_jax.text.tokenizer import Tokenizer


class Engine:
    """Generates with an unstacked model, and reuses the cache of the last single sequence.

    A single prompt that begins like the one before, as in a chat, is read only from where it
    differs: the cache of the earlier call is continued.

    Threads may call one engine at the same time. Each call has a cache of its own, and only one
    gets the earlier call's; results do not depend on which. An iterator that a call returns is for
    one thread at a time.
    """

    def __init__(
        self,
        model: Llama,
        cache_dtype: str = "",
        mesh: Mesh | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        """Make an engine.

        Args:
          cache_dtype: "int8" for a cache a fourth the size of float32's, "" for one in the model's
            compute dtype.
          mesh: what the model's arrays are sharded over, if they are.
          tokenizer: the model's; only requests with a json_schema, regex or grammar need it.
        """
        self.model, self.cache_dtype, self.mesh = model, cache_dtype, mesh
        self.tokenizer = tokenizer
        with on_mesh(mesh):
            self.execution = decoding_execution()
        self._kept: tuple[list[int], KVCache] | None = None
        self._compiled: set[Hashable] = set()  # decode programs of this engine, by their arguments
        self._lock = threading.Lock()

    def generate(self, request: Request) -> Iterator[Delta]:
        """Return an iterator over the deltas of a request, a chunk of tokens at a time.

        Each sequence depends on its own prompt and parameters only. It ends after `max_tokens`, or
        earlier at a stop id or where the model's context is full; its last delta has a
        `finish_reason`, and every sequence has at least one delta. Stop strings are not found
        here (see `inference.completions`).

        Raises:
          UserError: at once, when a prompt is empty or leaves no room for a token in the context.
          UsageError: at once, when a token id of `logit_bias`, or `logprobs`, exceeds the
            vocabulary, or no text of the tokenizer fits a constraint.
        """
        self.check(request)
        if request.shared.rng == "xorshift":
            deltas = self._generate_on_host(request)
        else:
            deltas = self._generate(request, self.constraints(request))
        return iterate_on_mesh(self.mesh, deltas) if self.mesh else deltas

    def check(self, request: Request) -> None:
        """Raise what `generate` raises for a request, constraints apart, that it cannot run."""
        context, vocab_size = self.model.config.context_length, self.model.config.vocab_size
        for prompt in request.prompts:
            if not 0 < len(prompt) < context:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens; expected 1 to {context - 1}, since the"
                    f" model's context holds {context}"
                )
        for params in request.params:
            for token in params.logit_bias:
                if token >= vocab_size:
                    raise UsageError(
                        f"logit_bias has the token id {token}; expected 0 to {vocab_size - 1}"
                    )
        logprobs = request.shared.logprobs
        if (logprobs or 0) > vocab_size:
            raise UsageError(f"logprobs={logprobs} is out of range; expected 0 to {vocab_size}")

    def constraints(self, request: Request) -> list[Constraint | None]:
        """Return what keeps each sequence of a request within its json_schema, regex or grammar.

        Raises:
          UsageError: when no text of the tokenizer fits, or the engine has no tokenizer.
        """
        return [
            self._constraint(params.constraint, prompt, request.stop_ids)
            for params, prompt in zip(request.params, request.prompts)
        ]

    def _constraint(
        self, wanted: tuple[str, str] | None, prompt: Sequence[int], stop_ids: Sequence[int]
    ) -> Constraint | None:
        if wanted is None:
            return None
        if self.tokenizer is None:
            raise UsageError(f"{wanted[0]} needs the model's tokenizer; give Engine one")
        vocab_size = self.model.config.vocab_size
        return Constraint(
            *wanted, self.tokenizer, stop_ids=stop_ids, vocab_size=vocab_size, prompt=prompt
        )

    def _generate(
        self, request: Request, constraints: Sequence[Constraint | None]
    ) -> Iterator[Delta]:
        """Prefill, then decode on the device until every sequence has ended."""
        prompts, shared = request.prompts, request.shared
        state, logits_BV = self._prefill(request)

        def masked(sampler: Sampler) -> Sampler:
            """Return the sampler of each sequence's next token."""
            if not any(constraints):
                return sampler
            allowed_BW = jnp.asarray(masks(constraints, self.model.config.vocab_size))
            return dataclasses.replace(sampler, allowed_BW=allowed_BW)

        sampler = masked(Sampler.of(request.params))
        stops_S = np.asarray([*request.stop_ids, NO_TOKEN], np.int32)
        if sampler.needs_counts:
            counts = TokenCounts.of(prompts, self.model.config.vocab_size)
            state = dataclasses.replace(state, counts=counts)
        state, tokens = sample_first_token(state, logits_BV, sampler, stops_S, shared.logprobs)
        history_BS = _history(prompts, tokens, state.cache.slots) if shared.speculate else None

        def next_tokens(state: GenerationState[KVCache]) -> tuple[GenerationState[KVCache], Tokens]:
            nonlocal history_BS
            if history_BS is None:
                options = shared.logprobs, self.execution
                return decode(self.model, state, sampler, stops_S, *options)
            state, history_BS, new_BW = decode_speculating(
                self.model, state, history_BS, stops_S, self.execution
            )
            return state, Tokens(new_BW)

        generated: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        try:
            leaves, structure = jax.tree.flatten((state, sampler, stops_S, history_BS))
            program = (structure, *map(np.shape, leaves), shared.logprobs)
            if (
                program not in self._compiled
                and max(each.max_tokens for each in request.params) > 1
            ):
                # Compile it now, so that no pause follows the first token. With every sequence
                # stopped it makes no token.
                self._compiled.add(program)
                stopped_B = state.stopped_B
                all_B = jnp.ones_like(stopped_B)
                state, _ = next_tokens(dataclasses.replace(state, stopped_B=all_B))
                state = dataclasses.replace(state, stopped_B=stopped_B)
            while True:
                for delta in _deltas(tokens, state):
                    if delta.index in running:
                        delta = _advance(constraints[delta.index], delta)
                        generated[delta.index] += delta.ids
                        if delta.finish_reason:
                            running.remove(delta.index)
                        yield delta
                if not running:
                    return
                sampler = masked(sampler)
                state, tokens = next_tokens(state)
        finally:
            # An interrupt may have come between donating the state and having the next one.
            if len(prompts) == 1 and not state.cache.length_B.is_deleted():
                cached = [*prompts[0], *generated[0]][: int(state.cache.length_B[0])]
                self._kept = cached, state.cache

    def _generate_on_host(self, request: Request) -> Iterator[Delta]:
        """Prefill, then choose token after token of a single sequence on the host.

        Slow, because the logits come to the host; only for a sampler that cannot be a `Sampler`.
        """
        [params], stop_ids = request.params, request.stop_ids
        sampler = XorshiftSampler(params.temperature, params.top_p, params.seed)
        state, logits_BV = self._prefill(request)
        cache, logits_V = state.cache, logits_BV[0]
        remaining = int(state.limit_B[0]) - len(request.prompts[0])
        for left in reversed(range(remaining)):
            token = sampler.choose(np.asarray(logits_V))
            if token in stop_ids:
                yield Delta(0, finish_reason="stop")
                return
            yield Delta(0, (token,), finish_reason="" if left else "length")
            logits_V, cache = decode_one(self.model, jnp.int32(token), cache, self.execution)

    def _prefill(self, request: Request) -> tuple[GenerationState[KVCache], jax.Array]:
        """Return the state after reading the prompts, and the logits [B, V] after each."""
        prompts, context = request.prompts, self.model.config.context_length
        lengths = [len(prompt) for prompt in prompts]
        limits = [min(n + each.max_tokens, context) for n, each in zip(lengths, request.params)]
        start, cache = self._take_kept_cache(prompts)
        # A pass of speculation writes its guesses before it is known how many of them stay.
        tokens = max(limits) + (NUM_GUESSES + 1) * request.shared.speculate
        slots = cache_slots(max(tokens, start + sum(prefill_chunks(max(lengths) - start))))
        if cache is None:
            sizes = len(prompts), slots, self.cache_dtype
            cache = empty_cache(self.model.config, *sizes, self.mesh)
        elif cache.slots < slots:
            cache = cache.with_slots(slots)
        cache, logits_BV = prefill(self.model, cache, prompts, start, execution=self.execution)
        seeds = [params.seed if params.rng == "jax" else 0 for params in request.params]
        state = GenerationState(
            cache=cache,
            token_B=jnp.asarray(lengths, jnp.int32),  # replaced by the first token
            stopped_B=jnp.zeros(len(prompts), bool),
            limit_B=jnp.asarray(limits, jnp.int32),
            keys_B=_keys(np.asarray(seeds, np.uint32)),
            counts=None,
        )
        return state, logits_BV

    def _take_kept_cache(self, prompts: Sequence[Sequence[int]]) -> tuple[int, KVCache | None]:
        """Return how many tokens of a single prompt the kept cache holds, and it; or (0, None).

        It is not kept any longer in either case: its memory goes to the new call.
        """
        with self._lock:  # two calls with one cache would donate it twice
            kept, self._kept = self._kept, None
        if kept is None or len(prompts) > 1:
            return 0, None
        (ids, cache), [prompt] = kept, prompts
        start = common_prefix(ids, prompt)
        return (start, cache) if start else (0, None)


_keys = jax.jit(jax.vmap(jax.random.key))


def _history(prompts: Sequence[Sequence[int]], tokens: Tokens, slots: int) -> jax.Array:
    """Return the ids of each sequence, the first new one included, as speculation needs them."""
    rows = [[*ids, max(int(first), 0)] for ids, first in zip(prompts, np.asarray(tokens.token))]
    return jnp.asarray(pad_sequences(rows, slots + DECODE_CHUNK + NUM_GUESSES + 1))


def _advance(constraint: Constraint | None, delta: Delta) -> Delta:
    """Return the delta; it is the last one if its constraint lets no more tokens follow."""
    if constraint is None:
        return delta
    is_complete = constraint.extend(delta.ids)
    return dataclasses.replace(delta, finish_reason="stop") if is_complete else delta


def _deltas(tokens: Tokens, state: GenerationState[KVCache]) -> list[Delta]:
    """Return a delta per sequence from arrays on the device."""
    ends = (state.stopped_B, state.cache.length_B, state.limit_B)
    stopped_B, length_B, limit_B = map(np.asarray, ends)
    done_B = are_done(stopped_B, length_B, limit_B)  # here: on the device it is three programs more
    return [
        Delta(
            index,
            tuple(ids),
            tokens.reported(index),
            "stop" if stopped_B[index] else "length" if done_B[index] else "",
        )
        for index, ids in enumerate(tokens.ids())
    ]
