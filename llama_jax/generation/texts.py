"""Text in, text out: prompts of ids are generated on, decoded as they grow, cut at stop strings."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llama_jax.generation.chunks import Chunk, Logprob
from llama_jax.generation.engine import Engine
from llama_jax.sampling.sampler import Sampler
from llama_jax.text.stop_strings import StopStrings
from llama_jax.text.token_decoder import Decoder
from llama_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of text that a row has gained."""

    row: int
    text: str
    ids: tuple[int, ...]
    finished: str  # "" while the row goes on; "stop", "length" or "context" when it has ended
    logprobs: tuple[Logprob, ...] = ()  # as many as ids where they were asked for

    @property
    def tokens(self) -> int:
        """Tokens that the row has gained."""
        return len(self.ids)


class _Row:
    """One row on its way from ids to text."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]):
        self._decoder, self._stops = decoder, StopStrings(stops)
        self.ended = False

    def gain(self, row: int, ids: Sequence[int], logprobs: Sequence[Logprob], reason: str) -> Piece:
        """The piece that new ids make; ids after the one that completes a stop string are lost."""
        text = ""
        for used, token in enumerate(ids, start=1):
            released, stopped = self._stops.push(self._decoder.push([token]))
            text += released
            if stopped:
                self.ended = True
                return Piece(row, text, tuple(ids[:used]), "stop", tuple(logprobs[:used]))
        if reason:
            self.ended = True
            released, stopped = self._stops.push(self._decoder.flush())
            text += released if stopped else released + self._stops.flush()
            reason = "stop" if stopped else reason
        return Piece(row, text, tuple(ids), reason, tuple(logprobs))


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_tokens: int,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    stops: Sequence[str] = (),
    logprobs: int | None = None,
    speculate: bool = False,
    choose: Callable[[np.ndarray], int] | None = None,
) -> Iterator[Piece]:
    """The texts that continue some prompts of ids, a piece at a time, rows interleaved.

    A character is held back until it is whole, and text that may become a stop string until it
    has not. A row that ends says so once: "stop" at a stop id or string, "length" after
    `max_tokens`, "context" where the model's context is full. A function `choose` chooses the
    tokens of a single prompt in the sampler's place; see `Engine.generate_on_host`.

    Raises:
      UserError: when a prompt does not leave room in the context; see also `Engine.generate`.
    """
    rows = [_Row(tokenizer.decoder(after=ids), stops) for ids in prompts]
    context = engine.model.config.context_length
    if choose is None:
        chunks = engine.generate(
            prompts,
            sampler,
            max_tokens=max_tokens,
            seeds=seeds,
            stop_ids=stop_ids,
            logprobs=logprobs,
            speculate=speculate,
        )
    else:
        [prompt] = prompts
        chunks = engine.generate_on_host(prompt, choose, max_tokens=max_tokens, stop_ids=stop_ids)
    for chunk in chunks:
        for index, (row, prompt) in enumerate(zip(rows, prompts)):
            if not row.ended:
                is_full = len(prompt) + max_tokens > context
                yield row.gain(index, *_part(chunk, index, is_full))
        if all(row.ended for row in rows):
            return


def _part(chunk: Chunk, row: int, is_full: bool) -> tuple[list[int], list[Logprob], str]:
    """One row of a chunk, its end told as users know it."""
    reason = chunk.finished[row]
    reason = "context" if reason == "length" and is_full else reason
    return chunk.rows[row], chunk.logprobs[row], reason


def stop_ids(tokenizer: Tokenizer, starts_with_bos: bool) -> tuple[int, ...]:
    """The ids at which a text ends: EOS, and BOS where documents were separated by it."""
    return (tokenizer.eos_id, tokenizer.bos_id) if starts_with_bos else (tokenizer.eos_id,)
