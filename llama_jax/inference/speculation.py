"""Prompt-lookup speculation: guess the next tokens from the text so far, check them all at once.

Where a text repeats itself (names, quotations, code), what followed the last time is a good guess
(Saxena 2023, prompt lookup decoding). The model reads the guess in one pass and keeps the part it
would have chosen itself (Leviathan et al. 2023, the greedy case), so nothing but speed changes.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import require
from llama_jax.inference.decode import CHUNK, NOTHING, GenerationState
from llama_jax.inference.filters import likeliest
from llama_jax.inference.prefill import WITH_CACHE
from llama_jax.inference.sampler import Sampler
from llama_jax.model.transformer import Llama

GUESSES = 7  # tokens guessed at once
MATCH = 2  # tokens that must agree before a guess


def require_plainly_greedy(sampler: Sampler, logprobs: int | None) -> None:
    """Raise `UsageError` unless the likeliest token is taken, and nothing told of others."""
    is_plain = sampler.greedy and not sampler.needs_counts and not sampler.bias_ids_I.size
    require(
        is_plain and logprobs is None,
        "speculate guesses what the likeliest token is; it goes with temperature 0, without"
        " penalties, biases or log-probabilities",
    )


def guess(history_BS: jax.Array, length_B: jax.Array) -> jax.Array:
    """Ids [B, GUESSES] that followed the latest earlier occurrence of a row's last `MATCH` tokens.

    Where fewer followed than are guessed, they come again and again: a text that goes round in a
    circle is guessed to go on so. Of a row without such an occurrence, its first ids.

    Args:
      history_BS: ids, of which the first `length_B` of a row are known.
    """

    def of_row(history_S: jax.Array, length: jax.Array) -> jax.Array:
        places_S = jnp.arange(history_S.shape[0])
        agrees_S = (places_S >= MATCH - 1) & (places_S < length - 1)
        for back in range(MATCH):
            agrees_S &= jnp.roll(history_S, back) == history_S[length - 1 - back]
        at = jnp.max(jnp.where(agrees_S, places_S, -1))
        return history_S[at + 1 + jnp.arange(GUESSES) % (length - 1 - at)]

    return jax.vmap(of_row)(history_BS, length_B)


class Progress(NamedTuple):
    """Where a stretch of guessing stands."""

    state: GenerationState
    history_BS: jax.Array  # ids of each row, `state.token_B` the last that is known
    new_BW: jax.Array  # those of this stretch, `NOTHING` after them and for a stop token
    made_B: jax.Array  # how many, a stop token included


@partial(jax.jit, donate_argnames=("state", "history_BS"))
def decode_guessing(
    model: Llama, state: GenerationState, history_BS: jax.Array, stops_S: jax.Array
) -> tuple[GenerationState, jax.Array, jax.Array]:
    """The greedy loop of `decoding.decode` with guesses: state, history and tokens [B, W].

    Args:
      history_BS: the ids of each row up to and with `state.token_B`; it has room for
        `CHUNK + GUESSES` more than the row's limit, as the cache has.
    """

    def going(progress: Progress) -> jax.Array:
        return (progress.made_B < CHUNK).all() & ~progress.state.done_B.all()

    B, width = state.token_B.shape[0], CHUNK + GUESSES + 1  # a last pass may overshoot the chunk
    new_BW, made_B = jnp.full((B, width), NOTHING, jnp.int32), jnp.zeros(B, jnp.int32)
    start = Progress(state, history_BS, new_BW, made_B)
    end = jax.lax.while_loop(going, partial(_guess_and_read, model, stops_S), start)
    return end.state, end.history_BS, end.new_BW


def _guess_and_read(model: Llama, stops_S: jax.Array, progress: Progress) -> Progress:
    """One pass of the model: it reads the last token and a guess, and chooses after each."""
    state, length_B = progress.state, progress.state.cache.length_B
    guess_BG = guess(progress.history_BS, length_B + 1)
    read_BT = jnp.concatenate([state.token_B[:, None], guess_BG], axis=1)
    logits_BTV, cache = model(read_BT, state.cache, execution=WITH_CACHE)
    assert cache is not None
    chosen_BT = likeliest(logits_BTV)
    room_B = jnp.where(state.done_B, 0, state.limit_B - length_B - 1)
    right_B = _right_guesses(guess_BG, chosen_BT)
    to_stop_B = _through_first_stop(chosen_BT, stops_S)
    # After the guesses that are right comes one token more, which the model chose by itself.
    kept_B = jnp.minimum(jnp.minimum(1 + right_B, to_stop_B), room_B)
    cache = dataclasses.replace(cache, length_B=length_B + kept_B)
    state = dataclasses.replace(state, cache=cache)
    return _with_tokens(progress._replace(state=state), chosen_BT, kept_B, to_stop_B <= kept_B)


def _right_guesses(guess_BG: jax.Array, chosen_BT: jax.Array) -> jax.Array:
    """How many guesses the model would have chosen, up to the first that it would not."""
    return jnp.cumprod(guess_BG == chosen_BT[:, :-1], axis=1, dtype=jnp.int32).sum(axis=1)


def _through_first_stop(chosen_BT: jax.Array, stops_S: jax.Array) -> jax.Array:
    """Tokens up to and with the first stop token; more than there are if there is none."""
    is_stop_BT = (chosen_BT[:, :, None] == stops_S[None, None]).any(axis=-1)
    most = chosen_BT.shape[1] + 1
    return jnp.where(is_stop_BT.any(axis=1), 1 + is_stop_BT.argmax(axis=1), most)


def _with_tokens(
    progress: Progress, chosen_BT: jax.Array, kept_B: jax.Array, stops_B: jax.Array
) -> Progress:
    """Progress with the first `kept_B` tokens of each row, which are in its cache's length already.

    Args:
      stops_B: rows of which the last of these is a stop token.
    """
    state = progress.state
    is_new_BT = jnp.arange(chosen_BT.shape[1])[None] < (kept_B - stops_B)[:, None]
    new_BW = _put(progress.new_BW, jnp.where(is_new_BT, chosen_BT, NOTHING), progress.made_B)
    # What lies beyond the kept ones is not known yet, and overwritten by the next pass.
    history_BS = _put(progress.history_BS, chosen_BT, state.cache.length_B - kept_B + 1)
    last_B1 = jnp.take_along_axis(chosen_BT, jnp.maximum(kept_B - 1, 0)[:, None], axis=1)
    token_B = jnp.where(kept_B > 0, last_B1[:, 0], state.token_B)
    state = dataclasses.replace(state, token_B=token_B, stopped_B=state.stopped_B | stops_B)
    return Progress(state, history_BS, new_BW, progress.made_B + kept_B)


def _put(rows_BS: jax.Array, new_BT: jax.Array, at_B: jax.Array) -> jax.Array:
    """Rows with new ids written in each from its own place on."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(rows_BS, new_BT, at_B, 0)
