"""Text in, text out: prompts of ids are generated on, decoded as they grow, cut at stop strings."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llama_jax.inference.decode import Chunk, Logprob
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request
from llama_jax.inference.sampler import Sampler
from llama_jax.text.stop_strings import StopStrings
from llama_jax.text.tokenizer import Decoder, Tokenizer


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


# What a library call returns: texts, and what is known of them.


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a completion took."""

    prompt_tokens: int  # BOS included
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token and what the model thought of it, before temperature, penalties and filters."""

    id: int
    text: str  # by itself; bytes that are no whole character show as U+FFFD
    logprob: float  # nats
    top: tuple["TokenLogprob", ...] = ()  # the likeliest in its place, likeliest first


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text that a model wrote."""

    text: str
    token_ids: tuple[int, ...]  # with those that completed a stop string, without a stop token
    finish_reason: str  # "stop": an end or stop string was met; "length": out of tokens or context
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None  # as many as ids, where they were asked for
    dropped: int = 0  # exchanges of a dialogue that were left out for want of room


@dataclasses.dataclass(frozen=True)
class CompletionPiece:
    """A stretch of a text as it grows."""

    index: int  # of the completion, in the order in which a call without streaming returns them
    text: str
    finish_reason: str  # "" while the text goes on, then once "stop" or "length"


def gather(pieces: Iterable[Piece], request: Request, tokenizer: Tokenizer) -> list[Completion]:
    """The completions that pieces add up to, one a row."""
    texts = list(request.echoes)
    ids: list[list[int]] = [[] for _ in texts]
    named: list[list[TokenLogprob]] = [[] for _ in texts]
    ends = [""] * len(texts)
    for piece in pieces:
        texts[piece.row] += piece.text
        ids[piece.row] += piece.ids
        named[piece.row] += [_named(tokenizer, *pair) for pair in zip(piece.ids, piece.logprobs)]
        ends[piece.row] = piece.finished
    return [
        Completion(
            text,
            tuple(new),
            _reason(end),
            Usage(len(prompt), len(new)),
            None if request.wishes.logprobs is None else tuple(logprobs),
        )
        for text, new, end, prompt, logprobs in zip(texts, ids, ends, request.rows, named)
    ]


def told(pieces: Iterable[Piece], request: Request) -> Iterator[CompletionPiece]:
    """Pieces as users see them; a prompt that is echoed comes first."""
    for index, echo in enumerate(request.echoes):
        if echo:
            yield CompletionPiece(index, echo, "")
    for piece in pieces:
        if piece.text or piece.finished:
            yield CompletionPiece(piece.row, piece.text, _reason(piece.finished))


def without_leading_space(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """An answer without the blanks before it: a chat format ends where they begin."""
    begun = False
    for piece in pieces:
        text = piece.text if begun else piece.text.lstrip()
        begun = begun or bool(text)
        yield dataclasses.replace(piece, text=text)


def _named(tokenizer: Tokenizer, token: int, said: Logprob) -> TokenLogprob:
    name = tokenizer.piece_text
    top = tuple(TokenLogprob(i, name(i), value) for i, value in said.top)
    return TokenLogprob(token, name(token), said.logprob, top)


def _reason(end: str) -> str:
    return "length" if end == "context" else end
