"""Samples on a terminal: text to stdout as it grows, all that is said about it to stderr."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from llama_jax.generation.request import Wishes
from llama_jax.generation.texts import Piece
from llama_jax.llm import LLM

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
    told = [piece for piece in pieces if piece.logprobs]
    if wishes.logprobs is not None:
        _print_logprobs(llm, told)


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
    """The pieces, then a line about speed: to the first token, and of those after it."""
    first, tokens = 0.0, 0
    for piece in pieces:
        if not first:
            first = time.perf_counter()
        else:
            tokens += piece.tokens
        yield piece
    seconds = time.perf_counter() - first
    rate = f"{tokens / seconds:,.0f} tokens/s" if tokens else "one token"
    print(f"\n[first token after {first - begun:.2f} s, then {rate}]", file=sys.stderr)
