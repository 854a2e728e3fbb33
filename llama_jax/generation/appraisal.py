"""What a model makes of whole texts: how likely they are, and where they lie as vectors."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from llama_jax.errors import UserError
from llama_jax.generation.prefill import padded, stretches
from llama_jax.generation.scoring import embeddings, token_logprobs
from llama_jax.model import Llama
from llama_jax.text.tokenizer import Tokenizer

AT_ONCE = 16  # texts read in one pass


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
    scores = []
    for tokens_BT, lengths in _batches(model, tokenizer, texts):
        told_BT = np.asarray(token_logprobs(model, tokens_BT))
        for ids, told_T, length in zip(tokens_BT, told_BT, lengths):
            scores.append(_score(ids[:length].tolist(), told_T[: length - 1].astype(np.float64)))
    return scores


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
    parts = []
    for tokens_BT, lengths in _batches(model, tokenizer, texts):
        length_B = jnp.asarray(lengths, jnp.int32)
        parts.append(np.asarray(embeddings(model, tokens_BT, length_B, normalize)))
    return np.concatenate(parts)


def _batches(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Ids of some texts at a time, BOS first, padded to lengths that repeat; and their lengths."""
    rows = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    most = model.config.context_length
    for ids in rows:
        if len(ids) > most:
            raise UserError(
                f"a text has {len(ids)} tokens; expected at most {most}, the model's context"
            )
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        lengths = [len(ids) for ids in part]
        yield padded(part, sum(stretches(max(2, *lengths)))), lengths
