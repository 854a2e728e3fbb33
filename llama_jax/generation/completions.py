"""What a library call returns: texts, and what is known of them."""

import dataclasses
from collections.abc import Iterable, Iterator

from llama_jax.generation.chunks import Logprob
from llama_jax.generation.request import Request
from llama_jax.generation.texts import Piece
from llama_jax.text.tokenizer import Tokenizer


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
