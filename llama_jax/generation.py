"""Text from a model: prefill the prompt, then one jitted loop over a key/value cache.

The loop runs on the device; the host sees tokens a chunk at a time, for streaming. Prompts of
different lengths share a batch: each row has its own cache length, key and end.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import KVCache
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.sampling import Sampler

CHUNK = 16  # tokens between two looks of the host
SMALLEST_PROMPT_BUCKET = 16  # prompts are padded to this or the next power of two
SLOT_BUCKET = 128  # cache slots are a multiple of this
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

    @property
    def done_B(self) -> jax.Array:
        """Rows that have met a stop token or their limit."""
        return self.stopped_B | (self.cache.length_B + 1 >= self.limit_B)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a stretch of the loop added: ids of each row, without the stop token."""

    rows: list[list[int]]
    finished: list[str]  # "" while a row goes on; "stop" at a stop token; "length" at its limit


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_tokens: int,
    seeds: Sequence[int],
    stop_ids: Sequence[int] = (),
) -> Iterator[Chunk]:
    """Continuations of prompts of token ids, chunk by chunk as the loop makes them.

    A row depends on its prompt and seed only, never on its neighbours. A row ends after
    `max_tokens`, or earlier at a stop id or where the model's context is full.

    Args:
      model: unstacked (see `model.unstack`).
      prompts: at least one id each.
      max_tokens: new tokens a row, at least 1.
      seeds: one a row.
      stop_ids: ids that end a row; they are not returned.

    Raises:
      UserError: when a prompt is empty or does not leave room for one token in the context.
    """
    context = model.config.context_length
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; expected 1 to {context - 1}, since the"
                f" model's context holds {context}"
            )
    tokens_BT, length_B = _padded(prompts, context)
    limit_B = np.minimum(length_B + min(max_tokens, context), context)
    slots = min(
        -(-int(max(limit_B.max(), tokens_BT.shape[1])) // SLOT_BUCKET) * SLOT_BUCKET, context
    )
    keys_B = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    stops_S = np.asarray([*stop_ids, NOTHING], np.int32)
    state, first_B = prefill(model, tokens_BT, length_B, limit_B, keys_B, sampler, stops_S, slots)
    yield _chunk(first_B[:, None], state)
    while not np.asarray(state.done_B).all():
        state, new_BC = decode(model, state, sampler, stops_S)
        yield _chunk(new_BC, state)


def _padded(prompts: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array padded on the right to a bucket, and their lengths."""
    length_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
    bucket = SMALLEST_PROMPT_BUCKET
    while bucket < length_B.max():
        bucket *= 2
    tokens_BT = np.zeros((len(prompts), min(bucket, context)), np.int32)
    for row, prompt in zip(tokens_BT, prompts):
        row[: len(prompt)] = prompt
    return tokens_BT, length_B


def _chunk(new_BC: jax.Array, state: GenerationState) -> Chunk:
    """The host's view of new tokens."""
    stopped_B, done_B = np.asarray(state.stopped_B), np.asarray(state.done_B)
    reasons = np.where(stopped_B, "stop", np.where(done_B, "length", ""))
    rows = [[int(token) for token in row if token != NOTHING] for row in np.asarray(new_BC)]
    return Chunk(rows, [str(reason) for reason in reasons])


@partial(jax.jit, static_argnames="slots")
def prefill(
    model: Llama,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    keys_B: jax.Array,
    sampler: Sampler,
    stops_S: jax.Array,
    slots: int,
) -> tuple[GenerationState, jax.Array]:
    """The state after reading padded prompts and choosing each row's first token, and that token.

    What padding wrote into the cache lies beyond `length_B`: masked, then overwritten.
    """
    cache = KVCache.empty(model.config, tokens_BT.shape[0], slots)
    hidden_BTD, filled = model.hidden(tokens_BT, cache)
    assert filled is not None
    cache = dataclasses.replace(filled, length_B=length_B)
    last_B1D = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)
    none_B = jnp.zeros(length_B.shape, bool)
    state = GenerationState(cache, length_B, none_B, limit_B, keys_B)
    return _choose(state, none_B, model.logits(last_B1D)[:, 0], sampler, stops_S)


@partial(jax.jit, donate_argnames="state")
def decode(
    model: Llama, state: GenerationState, sampler: Sampler, stops_S: jax.Array
) -> tuple[GenerationState, jax.Array]:
    """The state up to `CHUNK` tokens on, fewer once all rows are done, and those tokens [B, C]."""

    def going(carry: tuple[jax.Array, GenerationState, jax.Array]) -> jax.Array:
        return (carry[0] < CHUNK) & ~carry[1].done_B.all()

    def step(
        carry: tuple[jax.Array, GenerationState, jax.Array],
    ) -> tuple[jax.Array, GenerationState, jax.Array]:
        index, state, out_BC = carry
        logits_B1V, cache = model(state.token_B[:, None], state.cache)
        assert cache is not None
        # A row that is done stays where it is: what it writes lies beyond its length.
        done_B = state.done_B
        length_B = jnp.where(done_B, state.cache.length_B, cache.length_B)
        cache = dataclasses.replace(cache, length_B=length_B)
        state = dataclasses.replace(state, cache=cache)
        state, new_B = _choose(state, done_B, logits_B1V[:, 0], sampler, stops_S)
        return index + 1, state, out_BC.at[:, index].set(new_B)

    out_BC = jnp.full((state.token_B.shape[0], CHUNK), NOTHING, jnp.int32)
    _, state, out_BC = jax.lax.while_loop(going, step, (jnp.int32(0), state, out_BC))
    return state, out_BC


def _choose(
    state: GenerationState,
    done_B: jax.Array,
    logits_BV: jax.Array,
    sampler: Sampler,
    stops_S: jax.Array,
) -> tuple[GenerationState, jax.Array]:
    """The state with the next token of each row that was not done, and those tokens.

    `NOTHING` stands where a row was done already, or ends here at a stop token.
    """
    length_B = state.cache.length_B
    token_B = sampler(logits_BV, jax.vmap(jax.random.fold_in)(state.keys_B, length_B))
    stops_B = (token_B[:, None] == stops_S[None]).any(axis=-1)
    stopped_B = state.stopped_B | (stops_B & ~done_B)
    new_B = jnp.where(done_B | stopped_B, NOTHING, token_B)
    return dataclasses.replace(state, token_B=token_B, stopped_B=stopped_B), new_B
