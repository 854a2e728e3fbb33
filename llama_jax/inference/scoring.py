"""What a model thinks of given tokens: log-probabilities, and embeddings of whole sequences."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import UserError
from llama_jax.inference.prefill import padded, stretches, whole_sequence_execution
from llama_jax.model.transformer import Llama
from llama_jax.text.tokenizer import Tokenizer

POSITIONS = 64  # of each row, whose logits exist at once


@jax.jit
def token_logprobs(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Nats [B, T - 1] of each token after the first, given those before it; float32.

    Padding may follow a row: later tokens change nothing before them.
    """
    hidden_BTD, _ = model.hidden(tokens_BT, execution=whole_sequence_execution(model))
    B, T = tokens_BT.shape
    pieces = -(-(T - 1) // POSITIONS)
    fill = ((0, 0), (0, pieces * POSITIONS - (T - 1)))

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, fill + ((0, 0),) * (x.ndim - 2))
        return filled.reshape(B, pieces, POSITIONS, *x.shape[2:]).swapaxes(0, 1)

    def piece(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCD, targets_BC = pair
        logits_BCV = model.logits(hidden_BCD)
        chosen_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)
        return chosen_BC1[:, :, 0] - jax.nn.logsumexp(logits_BCV, axis=-1)

    told = jax.lax.map(piece, (cut(hidden_BTD[:, :-1]), cut(tokens_BT[:, 1:])))
    return told.swapaxes(0, 1).reshape(B, -1)[:, : T - 1]


@partial(jax.jit, static_argnames="normalize")
def embeddings(
    model: Llama, tokens_BT: jax.Array, length_B: jax.Array, normalize: bool = True
) -> jax.Array:
    """The mean over each row's tokens of the last hidden states, float32 [B, D].

    `normalize` scales each to length 1, so that a dot product of two is their cosine.
    """
    hidden_BTD, _ = model.hidden(tokens_BT, execution=whole_sequence_execution(model))
    is_token_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
    kept_BTD = jnp.where(is_token_BT[:, :, None], hidden_BTD.astype(jnp.float32), 0.0)
    mean_BD = kept_BTD.sum(axis=1) / length_B[:, None]
    if not normalize:
        return mean_BD
    return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)


# What a model makes of whole texts: how likely they are, and where they lie as vectors.

AT_ONCE = 16  # texts read in one pass, at most


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    token_ids: tuple[int, ...]  # BOS first
    logprobs: tuple[float, ...]  # nats of each id but the first, given those before it
    total: float  # their sum
    perplexity: float  # exp of minus their mean; 1 for a text without tokens


def score_texts(model: Llama, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Score]:
    """The score of each text.

    Raises:
      UserError: for a text longer than the context.
    """
    scores: dict[int, Score] = {}
    for batch in _batches(model, tokenizer, texts):
        told_BT = np.asarray(token_logprobs(model, batch.tokens_BT), np.float64)
        for row, (place, length) in enumerate(zip(batch.places, batch.lengths)):
            ids = batch.tokens_BT[row, :length].tolist()
            scores[place] = _score(ids, told_BT[row, : length - 1])
    return [scores[place] for place in range(len(texts))]


def _score(ids: list[int], logprobs: np.ndarray) -> Score:
    mean = float(logprobs.mean()) if logprobs.size else 0.0
    return Score(tuple(ids), tuple(logprobs.tolist()), float(logprobs.sum()), math.exp(-mean))


def embed_texts(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str], normalize: bool
) -> np.ndarray:
    """The mean hidden state of each text, float32 [texts, D], of length 1 if `normalize`.

    Raises:
      UserError: for a text longer than the context.
    """
    vectors_ND = np.zeros((len(texts), model.config.dim), np.float32)
    for batch in _batches(model, tokenizer, texts):
        vectors_BD = np.asarray(embeddings(model, batch.tokens_BT, batch.length_B, normalize))
        vectors_ND[batch.places] = vectors_BD[: len(batch.places)]
    return vectors_ND


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Texts that are read together."""

    places: list[int]  # in the list that was given
    lengths: list[int]  # ids of each
    tokens_BT: np.ndarray  # padded, with rows after theirs that are nobody's

    @property
    def length_B(self) -> np.ndarray:
        """Ids of each row; 1 of a row that is nobody's, for a mean over none would be NaN."""
        nobodys = len(self.tokens_BT) - len(self.lengths)
        return np.asarray(self.lengths + [1] * nobodys, np.int32)


def _batches(model: Llama, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[_Batch]:
    """Texts of like length together, in few shapes, so that little is padding or compiles anew."""
    rows = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    _require_room(rows, model.config.context_length)
    widths = [sum(stretches(len(ids))) for ids in rows]
    by_width = sorted(range(len(rows)), key=widths.__getitem__)
    for width, group in itertools.groupby(by_width, key=widths.__getitem__):
        alike = list(group)
        for start in range(0, len(alike), AT_ONCE):
            places = alike[start : start + AT_ONCE]
            ids = [rows[place] for place in places]
            nobodys = 2 ** (len(ids) - 1).bit_length() - len(ids)
            yield _Batch(places, [len(row) for row in ids], padded(ids + [[]] * nobodys, width))


def _require_room(rows: Sequence[Sequence[int]], most: int) -> None:
    for ids in rows:
        if len(ids) > most:
            raise UserError(
                f"a text has {len(ids)} tokens; expected at most {most}, the model's context"
            )
