"""Scoring and embedding: log-probabilities of given texts, and mean hidden states as vectors."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import UserError
from llama_jax.inference.decode import ON_MESH, attention_on_mesh, pad_sequences, prefill_chunks
from llama_jax.inference.request import TokenLogprob
from llama_jax.kernels.attention import choose_kernel
from llama_jax.model.execution import Execution
from llama_jax.model.transformer import Llama

MAX_BATCH = 16  # texts per forward pass
TopTokens = tuple[TokenLogprob, ...]  # the most likely ones first
LOGITS_CHUNK = 64  # positions per sequence whose logits exist at once


def full_sequence_execution(model: Llama) -> Execution:
    """Return how a pass without a cache runs here, with the device's fastest attention kernel."""
    config = model.config
    kernel = choose_kernel(
        "auto",
        jax.local_devices()[0],
        head_dim=config.head_size,
        dtype=config.compute_dtype,
        position=config.position,
    )
    return dataclasses.replace(ON_MESH, attention=attention_on_mesh(kernel))


@partial(jax.jit, static_argnames=("top", "chunk"))
def token_logprobs(
    model: Llama, tokens_BT: jax.Array, top: int = 0, chunk: int = LOGITS_CHUNK
) -> tuple[jax.Array, ...]:
    """Return the log-probability of each token after the first, given those before it.

    Sequences may be padded at the end: later tokens change nothing before them.

    Returns:
      Nats [B, T - 1], float32; whether the token is the most likely one [B, T - 1], bool; and the
      log-probabilities and ids of the `top` most likely tokens in its place [B, T - 1, top].
    """
    hidden_BTD, _ = model.hidden(tokens_BT, execution=full_sequence_execution(model))
    B, T = tokens_BT.shape
    chunks = -(-(T - 1) // chunk)
    fill = ((0, 0), (0, chunks * chunk - (T - 1)))

    def split(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, fill + ((0, 0),) * (x.ndim - 2))
        return filled.reshape(B, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(B, -1, *x.shape[3:])[:, : T - 1]

    def of_chunk(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        return score_hidden(model, *pair, top)

    found = jax.lax.map(of_chunk, (split(hidden_BTD[:, :-1]), split(tokens_BT[:, 1:])))
    return tuple(join(each) for each in found)


@partial(jax.jit, static_argnames="top")
def score_hidden(
    model: Llama, hidden_BTD: jax.Array, next_BT: jax.Array, top: int = 0
) -> tuple[jax.Array, ...]:
    """Return what `token_logprobs` does of the token that follows each hidden state, [B, T]."""
    logits_BTV = model.logits(hidden_BTD)
    next_logit_BT = jnp.take_along_axis(logits_BTV, next_BT[:, :, None], axis=-1)[:, :, 0]
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    own = next_logit_BT - total_BT, next_logit_BT >= logits_BTV.max(axis=-1)
    if not top:
        return own
    top_BTK, ids_BTK = jax.lax.top_k(logits_BTV, top)
    return *own, top_BTK - total_BT[:, :, None], ids_BTK


@partial(jax.jit, static_argnames="normalize")
def embeddings(
    model: Llama, tokens_BT: jax.Array, length_B: jax.Array, normalize: bool = True
) -> jax.Array:
    """Return the mean over each sequence's tokens of the last hidden states, float32 [B, D].

    `normalize` scales each to length 1, so that the dot product of two is their cosine.
    """
    hidden_BTD, _ = model.hidden(tokens_BT, execution=full_sequence_execution(model))
    is_token_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
    kept_BTD = jnp.where(is_token_BT[:, :, None], hidden_BTD.astype(jnp.float32), 0.0)
    mean_BD = kept_BTD.sum(axis=1) / length_B[:, None]
    if not normalize:
        return mean_BD
    return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    token_ids: tuple[int, ...]  # BOS first, if the model has one
    logprobs: tuple[float, ...]  # nats of each id but the first, given those before it
    total: float  # their sum
    perplexity: float  # exp of minus their mean; 1 for a text without tokens
    top: tuple[TopTokens, ...] = ()  # of each log-probability, if requested


def score_sequences(model: Llama, sequences: Sequence[Sequence[int]], top: int = 0) -> list[Score]:
    """Return the score of each sequence of token ids, none of them empty.

    One longer than the context is read in windows of the context that overlap by half. A token is
    scored in the first window that has it: given the tokens of that window before it, which are at
    least half a context but at the start of the text.
    """
    context = model.config.context_length
    windows = [
        (number, window)
        for number, ids in enumerate(sequences)
        for window in split_windows([ids], context, max(context // 2, 1))
    ]
    scored: list[list[float]] = [[] for _ in sequences]
    tops: list[list[TopTokens]] = [[] for _ in sequences]
    results = score_windows(model, [window for _, window in windows], top=top)
    for (number, _), result in zip(windows, results):
        scored[number] += result.logprobs.tolist()
        tops[number] += result.top
    return list(map(make_score, sequences, scored, tops))


def make_score(ids: Sequence[int], logprobs: Sequence[float], top: Sequence[TopTokens]) -> Score:
    """Return the score of token ids, from the log-probability of each but the first."""
    total = math.fsum(logprobs)
    perplexity = math.exp(-total / max(len(logprobs), 1))
    return Score(tuple(ids), tuple(logprobs), total, perplexity, tuple(top))


class Window(NamedTuple):
    """Tokens that a model reads at once, of which the last ones are scored."""

    ids: Sequence[int]
    known: int  # tokens at the start that are only read; at least 1


class WindowScore(NamedTuple):
    """The scored tokens of a window."""

    logprobs: np.ndarray  # nats of each, given those before it in the window; float64
    are_top: np.ndarray  # whether each is the most likely token
    top: list[TopTokens]  # the most likely tokens in the place of each, if requested


def split_windows(parts: Iterable[Sequence[int]], context: int, stride: int) -> Iterator[Window]:
    """Yield windows that cover a sequence; each token but the first is scored in one of them.

    Args:
      parts: of the sequence, which are read as the windows need them.
      context: tokens of a window; a shorter sequence is one window.
      stride: tokens from one window's start to that of the next, less than the context. The last
        window ends where the sequence ends.
    """
    held: list[int] = []
    start, known = 0, 1  # of the next window in `held`, if more than a window follows
    for part in parts:
        held += part
        while len(held) - start > context:
            yield Window(held[start : start + context], known)
            start, known = start + stride, context - stride
        used = max(start - stride, 0)  # the last window may begin between two others
        del held[:used]
        start -= used
    last = max(len(held) - context, 0)
    yield Window(held[last:], start + known - last)


def score_windows(
    model: Llama, windows: Sequence[Window], batch_size: int = MAX_BATCH, top: int = 0
) -> list[WindowScore]:
    """Return the score of each window; `batch_size` of them, of similar length, are read together.

    Args:
      top: most likely tokens to report in each place; 0: none.

    Raises:
      UserError: for a window longer than the context.
    """
    scores: dict[int, WindowScore] = {}
    for batch in batches(model, [window.ids for window in windows], batch_size):
        found = map(np.asarray, token_logprobs(model, batch.tokens_BT, top))
        for place, length, *arrays in zip(batch.places, batch.length_B, *found):
            scored = slice(windows[place].known - 1, length - 1)
            logprobs_T, are_top_T, *others = (array[scored] for array in arrays)
            tops = [
                tuple(map(TokenLogprob, ids.tolist(), values.tolist()))
                for values, ids in zip(*others)
            ]
            scores[place] = WindowScore(logprobs_T.astype(np.float64), are_top_T, tops)
    return [scores[place] for place in range(len(windows))]


def embed_sequences(
    model: Llama, sequences: Sequence[Sequence[int]], normalize: bool
) -> np.ndarray:
    """Return the mean hidden state of each sequence, float32 [N, D], of length 1 if `normalize`.

    Raises:
      UserError: for a sequence longer than the context.
    """
    vectors_ND = np.zeros((len(sequences), model.config.dim), np.float32)
    for batch in batches(model, sequences):
        vectors_BD = embeddings(model, batch.tokens_BT, batch.length_B, normalize)
        vectors_ND[batch.places] = np.asarray(vectors_BD)[: len(batch.places)]
    return vectors_ND


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences that are read together, padded, with filler after them."""

    places: list[int]  # in the list of sequences
    tokens_BT: np.ndarray
    length_B: np.ndarray  # ids; 1 for filler, since a mean over none would be NaN


def batches(
    model: Llama, sequences: Sequence[Sequence[int]], batch_size: int = MAX_BATCH
) -> Iterator[Batch]:
    """Yield sequences of similar length together, in few shapes: little padding, few compilations.

    Raises:
      UserError: for a sequence longer than the context.
    """
    context = model.config.context_length
    for ids in sequences:
        if len(ids) > context:
            raise UserError(
                f"a text has {len(ids)} tokens; expected at most {context}, the model's context"
            )
    widths = [sum(prefill_chunks(len(ids))) for ids in sequences]
    by_width = sorted(range(len(sequences)), key=widths.__getitem__)
    for width, group in itertools.groupby(by_width, key=widths.__getitem__):
        similar = list(group)
        for start in range(0, len(similar), batch_size):
            places = similar[start : start + batch_size]
            batch = [list(sequences[place]) for place in places]
            batch += [[]] * (2 ** (len(batch) - 1).bit_length() - len(batch))
            length_B = np.asarray([max(len(ids), 1) for ids in batch], np.int32)
            yield Batch(places, pad_sequences(batch, width), length_B)
