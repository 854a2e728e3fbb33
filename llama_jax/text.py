"""Text in, text out: prompts are encoded, generated on, and decoded as they grow."""

import dataclasses
from collections.abc import Iterator, Sequence

from llama_jax.generation import generate
from llama_jax.model import Llama
from llama_jax.sampling import Sampler
from llama_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of text that a row has gained."""

    row: int
    text: str
    tokens: int
    finished: str  # "" while the row goes on; "stop", "length" or "context" when it has ended


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampler: Sampler,
    *,
    max_tokens: int,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
) -> Iterator[Piece]:
    """The texts that continue some prompts, a piece at a time, rows interleaved.

    Each prompt gets BOS. A character is held back until it is whole. A row that ends says so once:
    "stop" at a stop id, "length" after `max_tokens`, "context" where the model's context is full.

    Raises:
      UserError: when a prompt does not leave room in the context.
    """
    encoded = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    decoders = [tokenizer.decoder(after=ids) for ids in encoded]
    ended = [False] * len(prompts)
    chunks = generate(
        model, encoded, sampler, max_tokens=max_tokens, seeds=seeds, stop_ids=stop_ids
    )
    for chunk in chunks:
        for row, (ids, reason) in enumerate(zip(chunk.rows, chunk.finished)):
            if ended[row]:
                continue
            text = decoders[row].push(ids)
            if reason:
                ended[row] = True
                text += decoders[row].flush()
                is_full = len(encoded[row]) + max_tokens > model.config.context_length
                reason = "context" if reason == "length" and is_full else reason
            yield Piece(row, text, len(ids), reason)


def stop_ids(tokenizer: Tokenizer, starts_with_bos: bool) -> tuple[int, ...]:
    """The ids at which a text ends: EOS, and BOS where documents were separated by it."""
    return (tokenizer.eos_id, tokenizer.bos_id) if starts_with_bos else (tokenizer.eos_id,)
