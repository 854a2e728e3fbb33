"""Texts that are read and not continued: for their embeddings, or for their log-probabilities.

They enter the slots of a batch as prompts do, one after the other, and are read by the same
programs, so that a text of a new length compiles nothing.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Generic, TypeVar

import jax
import numpy as np

from llama_jax.inference.request import TokenLogprob
from llama_jax.inference.scoring import Score, TopTokens, make_score, score_hidden
from llama_jax.model.transformer import Llama

MAX_LOGPROBS = 20  # top tokens that are reported, as in OpenAI's API
Found = TypeVar("Found")


class Reading(Generic[Found]):
    """Texts to read, of which one may be in a slot.

    Attributes:
      future: of what is found, in order; cancelling it ends the reading.
      num_read: tokens of the present text that are in its slot.
    """

    def __init__(self, texts: Sequence[Sequence[int]]):
        self._texts = texts
        self._found: list[Found] = []
        self.future: Future[list[Found]] = Future()
        self.num_read = 0

    @property
    def text(self) -> Sequence[int]:
        """The token ids of the present text."""
        return self._texts[len(self._found)]

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text."""
        return min(map(len, self._texts))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self._texts))

    @property
    def num_left(self) -> int:
        """Texts that have not been read to their end."""
        return len(self._texts) - len(self._found)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()

    def deliver(self, error: Exception) -> None:
        """End with an error."""
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            self.future.set_exception(error)

    def add(self, model: Llama, hidden_BTD: jax.Array, start: int) -> bool:
        """Take hidden states from a position on; return whether the present text ends there.

        B is 1. Positions before `num_read` may come again, and others after the text's end.
        """
        end = min(start + hidden_BTD.shape[1], len(self.text))
        self._take(model, hidden_BTD, start, end)
        self.num_read = end
        if end < len(self.text):
            return False
        self.num_read = 0
        self._found.append(self._result())
        if not self.num_left:
            with contextlib.suppress(InvalidStateError):
                self.future.set_result(self._found)
        return True

    def _take(self, model: Llama, hidden_BTD: jax.Array, start: int, end: int) -> None:
        """Take the hidden states of positions `num_read` to `end`, of those from `start` on."""
        raise NotImplementedError

    def _result(self) -> Found:
        """Return what was found of the present text, and forget it."""
        raise NotImplementedError


class EmbeddingReading(Reading[np.ndarray]):
    """Finds the mean hidden state of each text, float32 [D], of length 1: as `LLM.embed`."""

    _sum_D: np.ndarray | float = 0.0

    def _take(self, model: Llama, hidden_BTD: jax.Array, start: int, end: int) -> None:
        new_TD = np.asarray(hidden_BTD)[0, self.num_read - start : end - start]
        self._sum_D = self._sum_D + new_TD.sum(axis=0, dtype=np.float64)

    def _result(self) -> np.ndarray:
        sum_D, self._sum_D = np.asarray(self._sum_D), 0.0
        return (sum_D / np.linalg.norm(sum_D)).astype(np.float32)


class ScoreReading(Reading[Score]):
    """Finds the score of each text: as `LLM.score`.

    Args:
      top: most likely tokens to report in each place, at most `MAX_LOGPROBS`.
    """

    def __init__(self, texts: Sequence[Sequence[int]], top: int):
        super().__init__(texts)
        self._top = top
        self._logprobs: list[float] = []
        self._tops: list[TopTokens] = []

    def _take(self, model: Llama, hidden_BTD: jax.Array, start: int, end: int) -> None:
        next_BT = np.zeros(hidden_BTD.shape[:2], np.int32)
        following = self.text[start + 1 : end + 1]  # nothing follows the last token
        next_BT[0, : len(following)] = following
        new = slice(self.num_read - start, len(following))
        found = score_hidden(model, hidden_BTD, next_BT, MAX_LOGPROBS)
        logprobs_T, _, top_TK, ids_TK = (np.asarray(each)[0, new] for each in found)
        self._logprobs += logprobs_T.tolist()
        if self._top:
            for ids, values in zip(ids_TK[:, : self._top], top_TK[:, : self._top]):
                self._tops.append(tuple(map(TokenLogprob, ids.tolist(), values.tolist())))

    def _result(self) -> Score:
        score = make_score(self.text, self._logprobs, self._tops)
        self._logprobs, self._tops = [], []
        return score
