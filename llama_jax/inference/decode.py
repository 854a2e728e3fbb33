"""The decode loop: one jitted program that adds a stretch of tokens to every row of a batch.

Everything it changes is in `GenerationState`, which is donated: the cache is never copied. It does
not know prompts, text, or who waits for the tokens.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.inference.prefill import WITH_CACHE
from llama_jax.inference.sampler import Sampler, TokenCounts, TokenLogprobs, top_logprobs
from llama_jax.model.cache import KVCache
from llama_jax.model.transformer import Llama

CHUNK = 16  # tokens between two looks of the host
NOTHING = -1  # in place of a token, after a row's end


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerationState:
    """Where a batch of generations stands."""

    cache: KVCache
    token_B: jax.Array  # chosen last, not in the cache yet
    stopped_B: jax.Array  # rows that have met a stop token
    limit_B: jax.Array  # tokens, prompt included, at which a row ends
    keys_B: jax.Array
    counts: TokenCounts | None  # only where the sampler wants them

    @property
    def done_B(self) -> jax.Array:
        """Rows that have met a stop token or their limit."""
        return are_done(self.stopped_B, self.cache.length_B, self.limit_B)


Flags = TypeVar("Flags", jax.Array, np.ndarray)


def are_done(stopped_B: Flags, length_B: Flags, limit_B: Flags) -> Flags:
    """Rows that have met a stop token, or whose tokens, with the one chosen last, are all."""
    return stopped_B | (length_B + 1 >= limit_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Tokens of each row, `NOTHING` where there is none, and what the model thought of them."""

    token: jax.Array  # [B] or [B, C], int32
    logprobs: TokenLogprobs | None  # where they were asked for


def begin(
    state: GenerationState,
    logits_BV: jax.Array,
    sampler: Sampler,
    stops_S: jax.Array,
    logprobs: int | None = None,
) -> tuple[GenerationState, Chosen]:
    """The state after each row's first token, chosen from the logits that follow its prompt."""
    nobody_B = jnp.zeros(state.token_B.shape, bool)
    return choose(state, nobody_B, logits_BV, sampler, stops_S, logprobs)


@partial(jax.jit, donate_argnames="state", static_argnames="logprobs")
def decode(
    model: Llama,
    state: GenerationState,
    sampler: Sampler,
    stops_S: jax.Array,
    logprobs: int | None = None,
) -> tuple[GenerationState, Chosen]:
    """The state up to `CHUNK` tokens on, fewer once all rows are done, and those tokens [B, C]."""

    def step(state: GenerationState) -> tuple[GenerationState, Chosen]:
        logits_B1V, cache = model(state.token_B[:, None], state.cache, execution=WITH_CACHE)
        assert cache is not None
        # A row that is done stays where it is: what it writes lies beyond its length.
        done_B = state.done_B
        length_B = jnp.where(done_B, state.cache.length_B, cache.length_B)
        state = dataclasses.replace(state, cache=dataclasses.replace(cache, length_B=length_B))
        return choose(state, done_B, logits_B1V[:, 0], sampler, stops_S, logprobs)

    return _repeated(step, state, logprobs)


Step = Callable[[GenerationState], tuple[GenerationState, Chosen]]


def _repeated(
    step: Step, state: GenerationState, logprobs: int | None
) -> tuple[GenerationState, Chosen]:
    """Steps until `CHUNK` are made or all rows are done, and what they chose."""

    def going(carry: tuple[jax.Array, GenerationState, Chosen]) -> jax.Array:
        return (carry[0] < CHUNK) & ~carry[1].done_B.all()

    def turn(
        carry: tuple[jax.Array, GenerationState, Chosen],
    ) -> tuple[jax.Array, GenerationState, Chosen]:
        index, state, all_chosen = carry
        state, chosen = step(state)
        put = jax.tree.map(lambda whole, new: whole.at[:, index].set(new), all_chosen, chosen)
        return index + 1, state, put

    empty = _empty(state.token_B.shape[0], logprobs)
    _, state, chosen = jax.lax.while_loop(going, turn, (jnp.int32(0), state, empty))
    return state, chosen


def _empty(rows: int, logprobs: int | None) -> Chosen:
    token_BC = jnp.full((rows, CHUNK), NOTHING, jnp.int32)
    if logprobs is None:
        return Chosen(token_BC, None)
    top = (rows, CHUNK, logprobs)
    zeros_BC = jnp.zeros((rows, CHUNK), jnp.float32)
    return Chosen(token_BC, TokenLogprobs(zeros_BC, jnp.zeros(top, jnp.int32), jnp.zeros(top)))


def choose(
    state: GenerationState,
    done_B: jax.Array,
    logits_BV: jax.Array,
    sampler: Sampler,
    stops_S: jax.Array,
    logprobs: int | None,
) -> tuple[GenerationState, Chosen]:
    """The state with the next token of each row that was not done, and those tokens.

    `NOTHING` stands where a row was done already, or ends here at a stop token.
    """
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.cache.length_B)
    token_B = sampler(logits_BV, keys_B, state.counts)
    stops_B = (token_B[:, None] == stops_S[None]).any(axis=-1)
    stopped_B = state.stopped_B | (stops_B & ~done_B)
    counts = state.counts.add(token_B, ~done_B) if state.counts else None
    told = None if logprobs is None else top_logprobs(logits_BV, token_B, logprobs)
    new_B = jnp.where(done_B | stopped_B, NOTHING, token_B)
    state = dataclasses.replace(state, token_B=token_B, stopped_B=stopped_B, counts=counts)
    return state, Chosen(new_B, told)


# What the host sees of a stretch of the decode loop.


@dataclasses.dataclass(frozen=True)
class Logprob:
    """What the model thought of a token: its log-probability, and the likeliest ids with theirs."""

    logprob: float  # nats
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a stretch of the loop added: ids of each row, without the stop token."""

    rows: list[list[int]]
    finished: list[str]  # "" while a row goes on; "stop" at a stop token; "length" at its limit
    logprobs: list[list[Logprob]]  # as many as ids where they were asked for; else empty


def chunk_of(chosen: Chosen, state: GenerationState) -> Chunk:
    """The host's view of new tokens."""
    ends = (state.stopped_B, state.cache.length_B, state.limit_B)
    stopped_B, length_B, limit_B = map(np.asarray, ends)
    done_B = are_done(stopped_B, length_B, limit_B)  # here: on the device it is three programs more
    reasons = np.where(stopped_B, "stop", np.where(done_B, "length", ""))
    ids_BC = np.asarray(chosen.token).reshape(len(done_B), -1)
    rows = [[int(token) for token in row if token != NOTHING] for row in ids_BC]
    told: list[list[Logprob]] = [[] for _ in rows]
    if chosen.logprobs is not None:
        shape = ids_BC.shape
        own, top_ids, top = (np.asarray(array) for array in jax.tree.leaves(chosen.logprobs))
        own, top_ids, top = own.reshape(shape), top_ids.reshape(*shape, -1), top.reshape(*shape, -1)
        for b, c in zip(*np.nonzero(ids_BC != NOTHING)):
            pairs = tuple(zip(top_ids[b, c].tolist(), top[b, c].tolist()))
            told[b].append(Logprob(float(own[b, c]), pairs))
    return Chunk(rows, [str(reason) for reason in reasons], told)
