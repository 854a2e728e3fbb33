"""Prompt-lookup speculation: guess the next tokens from the text so far, check them in one pass.

Where a text repeats itself (names, quotations, code), what followed the last time is a good guess
(Saxena 2023, prompt lookup decoding). The model reads the guesses in one pass and keeps those that
it would have chosen itself (Leviathan et al. 2023, the greedy case), so only the speed changes.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.inference.decode import DECODE_CHUNK, NO_TOKEN, GenerationState
from llama_jax.inference.sampler import most_likely
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.transformer import ONE_DEVICE, Llama

NUM_GUESSES = 7  # tokens guessed per pass
NGRAM = 2  # tokens that must occur earlier for a guess


def guess_tokens(history_BS: jax.Array, length_B: jax.Array) -> jax.Array:
    """Return ids [B, NUM_GUESSES] that followed the latest earlier occurrence of the last n-gram.

    Where fewer followed than are guessed, they are repeated: a text in a loop is guessed to stay
    in it. A sequence whose n-gram did not occur earlier gets its first ids.

    Args:
      history_BS: ids, of which the first `length_B` of a sequence are known.
    """

    def of_sequence(history_S: jax.Array, length: jax.Array) -> jax.Array:
        places_S = jnp.arange(history_S.shape[0])
        matches_S = (places_S >= NGRAM - 1) & (places_S < length - 1)
        for back in range(NGRAM):
            matches_S &= jnp.roll(history_S, back) == history_S[length - 1 - back]
        at = jnp.max(jnp.where(matches_S, places_S, -1))
        return history_S[at + 1 + jnp.arange(NUM_GUESSES) % (length - 1 - at)]

    return jax.vmap(of_sequence)(history_BS, length_B)


class Progress(NamedTuple):
    """The state within one call of `decode_speculating`."""

    state: GenerationState[KVCache]
    history_BS: jax.Array  # ids of each sequence, `state.token_B` the last that is known
    new_BW: jax.Array  # new ids of this call, `NO_TOKEN` after them and for a stop token
    count_B: jax.Array  # new ids, a stop token included


@partial(jax.jit, donate_argnames=("state", "history_BS"), static_argnames="execution")
def decode_speculating(
    model: Llama,
    state: GenerationState[KVCache],
    history_BS: jax.Array,
    stops_S: jax.Array,
    execution: Execution = ONE_DEVICE,
) -> tuple[GenerationState[KVCache], jax.Array, jax.Array]:
    """Decode greedily with guesses, as `inference.decode.decode` does without.

    Returns state, history and new tokens [B, W].

    Args:
      history_BS: the ids of each sequence up to and with `state.token_B`; it has space for
        `DECODE_CHUNK + NUM_GUESSES` more than the sequence's limit, as the cache has.
    """

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.count_B < DECODE_CHUNK).all() & ~progress.state.done_B.all()

    # The last pass may go beyond the chunk.
    B, width = state.token_B.shape[0], DECODE_CHUNK + NUM_GUESSES + 1
    new_BW, count_B = jnp.full((B, width), NO_TOKEN, jnp.int32), jnp.zeros(B, jnp.int32)
    start = Progress(state, history_BS, new_BW, count_B)
    step = partial(_guess_and_check, model, stops_S, execution)
    end = jax.lax.while_loop(unfinished, step, start)
    return end.state, end.history_BS, end.new_BW


def _guess_and_check(
    model: Llama, stops_S: jax.Array, execution: Execution, progress: Progress
) -> Progress:
    """Run the model on the last token and the guesses, and keep what it chooses itself."""
    state, length_B = progress.state, progress.state.cache.length_B
    guess_BG = guess_tokens(progress.history_BS, length_B + 1)
    read_BT = jnp.concatenate([state.token_B[:, None], guess_BG], axis=1)
    logits_BTV, cache = model(read_BT, state.cache, execution=execution)
    assert cache is not None
    chosen_BT = most_likely(logits_BTV)
    T = chosen_BT.shape[1]
    # Kept: the correct guesses and one token more, which the model chose by itself, but nothing
    # after a stop token or beyond the limit.
    room_B = jnp.where(state.done_B, 0, state.limit_B - length_B - 1)
    correct_BG = jnp.cumprod(guess_BG == chosen_BT[:, :-1], axis=1, dtype=jnp.int32)
    is_stop_BT = (chosen_BT[:, :, None] == stops_S[None, None]).any(axis=-1)
    to_stop_B = jnp.where(is_stop_BT.any(axis=1), 1 + is_stop_BT.argmax(axis=1), T + 1)
    kept_B = jnp.minimum(jnp.minimum(1 + correct_BG.sum(axis=1), to_stop_B), room_B)
    stops_B = to_stop_B <= kept_B

    is_new_BT = jnp.arange(T)[None] < (kept_B - stops_B)[:, None]
    new_BW = _write(progress.new_BW, jnp.where(is_new_BT, chosen_BT, NO_TOKEN), progress.count_B)
    # What lies beyond the kept tokens is not known yet, and overwritten by the next pass.
    history_BS = _write(progress.history_BS, chosen_BT, length_B + 1)
    last_B1 = jnp.take_along_axis(chosen_BT, jnp.maximum(kept_B - 1, 0)[:, None], axis=1)
    state = dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, length_B=length_B + kept_B),
        token_B=jnp.where(kept_B > 0, last_B1[:, 0], state.token_B),
        stopped_B=state.stopped_B | stops_B,
    )
    return Progress(state, history_BS, new_BW, progress.count_B + kept_B)


def _write(ids_BS: jax.Array, new_BT: jax.Array, at_B: jax.Array) -> jax.Array:
    """Return the ids with new ones written from each sequence's own place on."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(ids_BS, new_BT, at_B, 0)
