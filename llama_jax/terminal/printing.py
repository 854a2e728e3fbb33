"""Samples on a terminal: text to stdout as it grows, all that is said about it to stderr."""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llama_jax.generation.request import Wishes
from llama_jax.generation.texts import Piece
from llama_jax.llm import LLM
from llama_jax.text.messages import Message

WHY = {
    "length": "stopped after --max_tokens",
    "context": "stopped where the model's context is full",
}


def print_samples(
    llm: LLM,
    prompts: Sequence[str],
    wishes: Wishes,
    *,
    begun: float,
    echo: bool = True,
) -> None:
    """Print the texts that are wished for, each prompt's in turn.

    Text j of any prompt has a seed of its own, so a prompt gives alone what it gives among others.

    Args:
      begun: `time.perf_counter()` at the start of the program, for the time to the first token.

    Raises:
      UserError: when a prompt does not fit.
    """
    request = llm.request(list(prompts), wishes, echo)
    pieces = _print_in_order(request.echoes, _timed(llm.pieces(request), begun))
    told = sorted((piece for piece in pieces if piece.logprobs), key=lambda piece: piece.row)
    if wishes.logprobs is not None:
        _print_logprobs(llm, told)


def print_answer(llm: LLM, messages: Sequence[Message], **options: Any) -> None:
    """Print the answer to a dialogue as it grows; `options` are those of `LLM.chat`."""
    with warnings_told():
        pieces = llm.chat(messages, stream=True, **options)
    end = ""
    for piece in pieces:
        print(piece.text, end="", flush=True)
        end = piece.finish_reason
    print(flush=True)
    if end in WHY:
        print(f"[{WHY[end]}]", file=sys.stderr)


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """At the end of the block, a line on stderr for each warning that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"[{warning.message}]", file=sys.stderr)


def _print_logprobs(llm: LLM, pieces: Iterable[Piece]) -> None:
    """On stderr, a line a token: its log-probability, its text, and the likeliest in its place."""
    name = llm.tokenizer.piece_text
    for piece in pieces:
        for token, told in zip(piece.ids, piece.logprobs):
            top = "  ".join(f"{name(other)!r} {value:.3f}" for other, value in told.top)
            line = f"[{piece.row + 1}] {told.logprob:8.3f}  {name(token)!r}"
            print(f"{line:<32}{top}".rstrip(), file=sys.stderr)


def _print_in_order(prompts: Sequence[str], pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The first row as it grows; the others, which grow beside it, once those before are out.

    Each piece is passed on once it has been dealt with.
    """
    waiting: list[list[str]] = [[prompt] for prompt in prompts]
    ends = [""] * len(prompts)
    current = 0
    for piece in pieces:
        waiting[piece.row].append(piece.text)
        ends[piece.row] = piece.finished or ends[piece.row]
        while current < len(prompts):
            print("".join(waiting[current]), end="", flush=True)
            waiting[current].clear()
            if not ends[current]:
                break
            print(flush=True)
            current += 1
            if current < len(prompts):
                print(flush=True)
        yield piece
    for row, end in enumerate(ends):
        if end in WHY:
            which = f"sample {row + 1}: " if len(ends) > 1 else ""
            print(f"[{which}{WHY[end]}]", file=sys.stderr)


def _timed(pieces: Iterable[Piece], begun: float) -> Iterator[Piece]:
    """The pieces, then a line about speed: to the first token, and of those after it.

    The chunk after the first tokens has its program compiled or loaded; where there are more, the
    speed is theirs.
    """
    times: list[float] = []  # of the first token, and of the end of each chunk after it
    tokens: list[int] = []  # of all rows, that each brought
    row = -1
    for piece in pieces:
        now = time.perf_counter()
        if piece.row <= row or not times:  # a chunk begins
            times.append(now)
            tokens.append(0)
        row, times[-1] = piece.row, now
        tokens[-1] += piece.tokens
        yield piece
    skipped = 2 if len(times) > 2 else 1
    seconds = times[-1] - times[skipped - 1]
    rate = f"{sum(tokens[skipped:]) / seconds:,.0f} tokens/s" if len(times) > 1 else "one token"
    print(f"\n[first token after {times[0] - begun:.2f} s, then {rate}]", file=sys.stderr)
