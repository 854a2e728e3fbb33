"""Samples on a terminal: text to stdout as it grows, all that is said about it to stderr."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from llama_jax.config import require
from llama_jax.loading import load
from llama_jax.model import unstack
from llama_jax.sampling import Sampler
from llama_jax.text import Piece, stop_ids, stream

MOST_SAMPLES = 10_000  # of a prompt; they are made side by side
WHY = {
    "length": "stopped after --max_tokens",
    "context": "stopped where the model's context is full",
}


def print_samples(
    checkpoint: str,
    prompts: Sequence[str],
    sampler: Sampler,
    *,
    max_tokens: int,
    num_samples: int,
    seed: int,
    begun: float,
) -> None:
    """Print continuations of prompts, each `num_samples` times with seeds of its own.

    Sample j of any prompt has seed `seed` + j, so a prompt gives alone what it gives among others.
    `begun` is `time.perf_counter()` at the start of the program, for the time to the first token.

    Raises:
      UsageError: for a number out of range.
      UserError: when the checkpoint cannot be used, or a prompt does not fit.
    """
    require(max_tokens >= 1, f"max_tokens={max_tokens} is out of range; expected 1 or more")
    require(
        1 <= num_samples <= MOST_SAMPLES,
        f"num_samples={num_samples} is out of range; expected 1 to {MOST_SAMPLES}",
    )
    require(
        0 <= seed < 2**31 - num_samples,
        f"seed={seed} is out of range; expected 0 to {2**31 - num_samples - 1}",
    )
    loaded = load(checkpoint)
    rows = [(prompt, seed + j) for prompt in prompts for j in range(num_samples)]
    pieces = stream(
        unstack(loaded.model, len(rows)),
        loaded.tokenizer,
        [prompt for prompt, _ in rows],
        sampler,
        max_tokens=max_tokens,
        seeds=[row_seed for _, row_seed in rows],
        stop_ids=stop_ids(loaded.tokenizer, loaded.bos),
    )
    _print_in_order([prompt for prompt, _ in rows], _timed(pieces, begun))


def _print_in_order(prompts: Sequence[str], pieces: Iterable[Piece]) -> None:
    """The first row as it grows; the others, which grow beside it, once those before are out."""
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
