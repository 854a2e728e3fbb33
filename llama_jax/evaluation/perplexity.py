"""Perplexity of text files: how well a model predicts each token, given those before it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from llama_jax.data.prepare.documents import Chunk
from llama_jax.distributed.mesh import on_mesh
from llama_jax.errors import whole_number
from llama_jax.inference.completions import encode_prompt
from llama_jax.inference.scoring import MAX_BATCH, Window, score_windows, split_windows
from llama_jax.llm import LLM

BATCHES_AT_ONCE = 8  # whose windows are sorted by length together


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Tokens that are only read do not count: BOS, or without it the first token of a document.
    """

    documents: int
    tokens: int
    bytes: int  # of UTF-8 that the tokens stand for
    logprob: float  # nats of all tokens

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.logprob / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss, per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which does not depend on the tokenizer."""
        return -self.logprob / math.log(2) / self.bytes

    def __add__(self, other: "Perplexity") -> "Perplexity":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Perplexity(*(one + another for one, another in pairs))


NOTHING = Perplexity(documents=0, tokens=0, bytes=0, logprob=0.0)


def text_perplexity(
    llm: LLM,
    chunks: Iterable[Chunk],
    stride: int = 0,
    batch_size: int = MAX_BATCH,
    show: Callable[[int], object] = lambda tokens: None,
) -> Perplexity:
    """Return how well a model predicts documents, each by itself, in little memory.

    Args:
      chunks: of the documents, which are read as they are needed.
      stride: a document longer than the context is read in windows of the context, this many tokens
        apart, and a token is scored in the first window that has it. 0 is the most, context - 1:
        each token is read once, given those of its window. Smaller strides give tokens more
        context, context - stride tokens at least, and cost more.
      batch_size: windows that are read together, which may be of several documents.
      show: called now and then with the number of tokens scored so far.

    Raises:
      UsageError: for a stride or a batch size out of range.
    """
    context = llm.context_length
    expected = f"1 to {context - 1}, less than the context; 0: {context - 1}"
    whole_number("stride", stride, lambda n: 0 <= n < context, expected)
    whole_number("batch_size", batch_size, lambda n: n >= 1, "1 or more")
    documents, tokens, size, logprob = 0, 0, 0, 0.0

    def parts(first: Chunk, others: Iterator[Chunk]) -> Iterator[list[int]]:
        """Yield the ids of a document, chunk after chunk."""
        nonlocal documents, size
        ids = encode_prompt(llm.tokenizer, first.text, llm.bos)
        documents, size = documents + 1, size + len(first.text.encode())
        if not llm.bos:  # a document does not begin with a space, although the piece may
            size -= len(llm.tokenizer.piece_bytes(ids[0]).removeprefix(b" "))
        yield ids
        chunk = first
        while not chunk.is_last:
            chunk = next(others)
            size += len(chunk.text.encode())
            yield llm.tokenizer.encode_array(chunk.text, continues=True).tolist()

    def windows() -> Iterator[Window]:
        others = iter(chunks)
        for first in others:
            yield from split_windows(parts(first, others), context, stride or context - 1)

    remaining = windows()
    with on_mesh(llm.engine.mesh):
        while group := list(itertools.islice(remaining, BATCHES_AT_ONCE * batch_size)):
            for score in score_windows(llm.engine.model, group, batch_size):
                tokens += len(score.logprobs)
                logprob += float(score.logprobs.sum())
            show(tokens)
    return Perplexity(documents, tokens, size, logprob)
