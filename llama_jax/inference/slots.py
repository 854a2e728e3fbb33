"""Continuous batching: the jitted programs that serve sequences which come and go in slots.

All that changes is one `GenerationState` with a `SlotCache`, which every program is donated. A
prompt is read into its slot in chunks, all but its last token; `activate` puts that into the batch,
and the first step of the next block decodes it. The programs are few, and their number does not
depend on the requests: see `chunk_size` and `sampler.Level`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.inference.decode import GenerationState, Tokens, decode_steps
from llama_jax.inference.sampler import Sampler, TokenCounts
from llama_jax.model.execution import Execution
from llama_jax.model.slot_cache import OneSlot, SlotCache
from llama_jax.model.transformer import ONE_DEVICE, Llama

CHUNK_SIZES = (256, 64, 16)  # tokens of a prompt that one program reads


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_slots(
    config: ModelConfig, slots: int, context: int, cache_dtype: str = ""
) -> GenerationState[SlotCache]:
    """Return the state of slots that no sequence uses, each with room for `context` tokens."""
    counts_BV = jnp.zeros((slots, config.vocab_size), jnp.int32)
    zeros_B = jnp.zeros(slots, jnp.int32)
    return GenerationState(
        cache=SlotCache.empty(config, slots, max(context, *CHUNK_SIZES), cache_dtype),
        token_B=zeros_B,
        stopped_B=jnp.ones(slots, bool),
        limit_B=jnp.zeros_like(zeros_B),
        keys_B=jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32)),
        counts=TokenCounts(counts_BV, jnp.zeros_like(counts_BV)),
    )


def chunk_size(tokens: int) -> int:
    """Return how many tokens of a prompt to read at once, when so many are left.

    The rest of a chunk is padding: at most half of it, but in the smallest.
    """
    return next((size for size in CHUNK_SIZES if tokens > size // 2), CHUNK_SIZES[-1])


@partial(jax.jit, donate_argnames="state", static_argnames="execution")
def read_chunk(
    model: Llama,
    state: GenerationState[SlotCache],
    slot: jax.Array,
    start: jax.Array,
    ids_T: jax.Array,
    execution: Execution = ONE_DEVICE,
) -> tuple[GenerationState[SlotCache], jax.Array]:
    """Return the state after reading tokens into a slot, and their last hidden states [1, T, D].

    The first of them is at position `start`. Padding after them lies beyond the sequence: never
    read, then overwritten.
    """
    prompt = OneSlot(state.cache.layers, slot, start[None])
    hidden_BTD, filled = model.hidden(ids_T[None], prompt, execution=execution)
    assert filled is not None
    cache = dataclasses.replace(state.cache, layers=filled.layers)
    return dataclasses.replace(state, cache=cache), hidden_BTD


@partial(jax.jit, donate_argnames="state")
def copy_prefix(
    state: GenerationState[SlotCache], source: jax.Array, target: jax.Array, length: jax.Array
) -> GenerationState[SlotCache]:
    """Return the state with the first `length` tokens of one slot in another one, too."""
    return dataclasses.replace(state, cache=state.cache.copy(source, target, length))


@partial(jax.jit, donate_argnames="state")
def activate(
    state: GenerationState[SlotCache],
    slot: jax.Array,
    token: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    seed: jax.Array,
    counts_V: jax.Array,
) -> GenerationState[SlotCache]:
    """Return the state with a sequence in a slot, whose prompt has been read.

    Args:
      token: the last of the prompt, not in the cache yet.
      length: tokens of the prompt before it.
      limit: tokens, prompt included, at which the sequence ends.
      seed: uint32, of its random numbers.
      counts_V: how often each token occurs in the prompt; read only if the sequence has penalties.
    """
    assert state.counts is not None
    cache = dataclasses.replace(state.cache, length_B=state.cache.length_B.at[slot].set(length))
    return GenerationState(
        cache=cache,
        token_B=state.token_B.at[slot].set(token),
        stopped_B=state.stopped_B.at[slot].set(False),
        limit_B=state.limit_B.at[slot].set(limit),
        keys_B=state.keys_B.at[slot].set(jax.random.key(seed)),
        counts=TokenCounts(
            state.counts.prompt_BV.at[slot].set(counts_V),
            state.counts.generated_BV.at[slot].set(0),
        ),
    )


@partial(jax.jit, donate_argnames="state", static_argnames=("logprobs", "execution"))
def decode_slots(
    model: Llama,
    state: GenerationState[SlotCache],
    active_B: jax.Array,
    sampler: Sampler,
    stops_BS: jax.Array,
    steps: jax.Array,
    logprobs: int | None = None,
    execution: Execution = ONE_DEVICE,
) -> tuple[GenerationState[SlotCache], Tokens, jax.Array]:
    """Return the state up to `steps` tokens later, those tokens, and which sequences stopped.

    Args:
      active_B: slots with a sequence that was activated; the others are left as they are.
      stops_BS: ids that end a sequence, which are not returned.
      steps: at most `DECODE_CHUNK`, which is the width of the tokens.
    """
    # What attention reads is bounded by the longest stored sequence.
    stored_B = jnp.where(active_B, state.cache.length_B, 0)
    cache = dataclasses.replace(state.cache, stored_B=stored_B)
    state = dataclasses.replace(state, cache=cache, stopped_B=state.stopped_B | ~active_B)
    state, tokens = decode_steps(model, state, sampler, stops_BS, steps, logprobs, execution)
    state = dataclasses.replace(state, cache=state.cache.flush(active_B))
    return state, tokens, state.stopped_B


@partial(jax.jit, donate_argnames="state", static_argnames=("logprobs", "execution"))
def decode_one_slot(
    model: Llama,
    state: GenerationState[SlotCache],
    slot: jax.Array,
    sampler: Sampler,
    stops_BS: jax.Array,
    steps: jax.Array,
    logprobs: int | None = None,
    execution: Execution = ONE_DEVICE,
) -> tuple[GenerationState[SlotCache], Tokens, jax.Array]:
    """Return what `decode_slots` does where one slot is active; B is 1 in what comes and goes.

    On CPU it is faster, since there every sequence of a batch takes time. Tokens are the same but
    for rounding.
    """
    cache, counts = state.cache, state.counts
    assert counts is not None

    def pick(array_B: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array_B, slot, 1)

    def put(array_B: jax.Array, new_B: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array_B, new_B, slot, 0)

    one = GenerationState(
        cache=OneSlot(cache.layers, slot, pick(cache.length_B)),
        token_B=pick(state.token_B),
        stopped_B=pick(state.stopped_B),
        limit_B=pick(state.limit_B),
        keys_B=pick(state.keys_B),
        counts=jax.tree.map(pick, counts),
    )
    one, tokens = decode_steps(model, one, sampler, stops_BS, steps, logprobs, execution)
    length_B = put(cache.length_B, one.cache.length_B)
    state = dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, layers=one.cache.layers, length_B=length_B),
        token_B=put(state.token_B, one.token_B),
        stopped_B=put(state.stopped_B, one.stopped_B),
        counts=jax.tree.map(put, counts, one.counts),
    )
    return state, tokens, one.stopped_B
