"""Prompt-lookup speculation: guess the next tokens from the text so far, check them all at once.

Where a text repeats itself (names, quotations, code), what followed the last time is a good guess
(Saxena 2023, prompt lookup decoding). The model reads the guess in one pass and keeps the part it
would have chosen itself (Leviathan et al. 2023, the greedy case), so nothing but speed changes.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.config import require
from llama_jax.generation.decoding import CHUNK, NOTHING, GenerationState
from llama_jax.model import Llama
from llama_jax.sampling.drawing import likeliest
from llama_jax.sampling.sampler import Sampler

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


@partial(jax.jit, donate_argnames=("state", "history_BS"))
def decode_guessing(
    model: Llama, state: GenerationState, history_BS: jax.Array, stops_S: jax.Array
) -> tuple[GenerationState, jax.Array, jax.Array]:
    """The greedy loop of `decoding.decode` with guesses: state, history and tokens [B, C].

    Args:
      history_BS: the ids of each row up to and with `state.token_B`; it has room for
        `CHUNK + GUESSES` more than the row's limit, as the cache has.
    """
    B = state.token_B.shape[0]
    width = CHUNK + GUESSES + 1  # a last pass may overshoot the chunk

    def going(carry):  # type: ignore[no-untyped-def]
        state, _, _, made_B = carry
        return (made_B < CHUNK).all() & ~state.done_B.all()

    def turn(carry):  # type: ignore[no-untyped-def]
        state, history_BS, out_BW, made_B = carry
        length_B, done_B = state.cache.length_B, state.done_B
        guess_BG = guess(history_BS, length_B + 1)
        read_BT = jnp.concatenate([state.token_B[:, None], guess_BG], axis=1)
        logits_BTV, cache = model(read_BT, state.cache)
        token_BT = likeliest(logits_BTV)
        agrees_BG = jnp.cumprod(guess_BG == token_BT[:, :-1], axis=1)
        gained_B = 1 + agrees_BG.sum(axis=1).astype(jnp.int32)
        is_stop_BT = (token_BT[:, :, None] == stops_S[None, None]).any(axis=-1)
        before_stop_B = jnp.where(is_stop_BT.any(axis=1), is_stop_BT.argmax(axis=1), GUESSES + 1)
        stops_B = before_stop_B < gained_B
        room_B = state.limit_B - length_B - 1
        gained_B = jnp.minimum(jnp.minimum(gained_B, before_stop_B + stops_B), room_B)
        gained_B = jnp.where(done_B, 0, gained_B)
        stops_B = ~done_B & (before_stop_B < gained_B)
        places_T = jnp.arange(GUESSES + 1)
        is_new_BT = places_T[None] < (gained_B - stops_B)[:, None]
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        out_BW = put(out_BW, jnp.where(is_new_BT, token_BT, NOTHING), made_B)
        history_BS = put(history_BS, token_BT, length_B + 1)
        last_B = jnp.take_along_axis(token_BT, jnp.maximum(gained_B - 1, 0)[:, None], axis=1)[:, 0]
        cache = dataclasses.replace(cache, length_B=length_B + gained_B)
        state = dataclasses.replace(
            state,
            cache=cache,
            token_B=jnp.where(done_B, state.token_B, last_B),
            stopped_B=state.stopped_B | stops_B,
        )
        return state, history_BS, out_BW, made_B + gained_B

    out_BW = jnp.full((B, width), NOTHING, jnp.int32)
    start = (state, history_BS, out_BW, jnp.zeros(B, jnp.int32))
    state, history_BS, out_BW, _ = jax.lax.while_loop(going, turn, start)
    return state, history_BS, out_BW
