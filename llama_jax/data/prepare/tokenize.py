"""A corpus becomes a token folder, on all cores, in little memory, whole or not at all.

The result is the same for any number of workers: they only tokenize, each a batch of passages at
a time (SentencePiece lets threads run side by side), and their results are taken in order. Does
not know where corpora come from.
"""

import collections
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llama_jax.data.prepare.corpus import Assigned, Corpus
from llama_jax.data.prepare.documents import Passage, Reading
from llama_jax.data.token_folder import TOKENIZER, TokenFolder, TokenWriter
from llama_jax.files import new_folder, progress
from llama_jax.text.tokenizer import Tokenizer, train_tokenizer

BATCH = 2**18  # characters that a worker tokenizes at a time
SAMPLE = 64_000_000  # characters that a tokenizer is trained on, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How text becomes tokens on disk."""

    tokenizer: str = ""  # SentencePiece model to use; empty: train one
    vocab_size: int = 4096  # pieces of the one that is trained
    bos: bool = True  # put BOS before each document
    eos: bool = False  # put EOS after each document
    shard_tokens: int = 100_000_000  # tokens in a file
    workers: int = 0  # threads; 0: as many as there are cores


def prepare(corpus: Corpus, output: Path, options: TokenOptions) -> TokenFolder:
    """Tokenize a corpus into a new folder `output`.

    Raises:
      UserError: if the folder exists or cannot be written, the tokenizer is unusable or cannot be
        trained on this text, or the text is damaged. Nothing is left behind then.
    """
    with new_folder(output) as folder:
        tokenizer = _tokenizer(corpus, folder / TOKENIZER, options)
        writer = TokenWriter(folder, tokenizer.vocab_size, options.shard_tokens)
        reading = Reading(errors=corpus.errors)
        encoder = _Encoder(tokenizer, options)
        try:
            with progress("tokenizing", corpus.size, corpus.unit) as show:
                for encoded in encoder.encode_all(corpus.read(reading)):
                    writer.add(*encoded)
                    show(reading.done)
            writer.finish(options.bos, options.eos, corpus.source)
        finally:
            writer.close()
    return TokenFolder.open(output)


def summary(folder: TokenFolder) -> list[str]:
    """What a token folder holds, in lines for people."""
    lines = []
    for name, split in folder.splits.items():
        line = f"{name}: {split.documents:,} documents, {split.tokens:,} tokens"
        if split.documents and split.tokens:
            line += f", {split.tokens / split.documents:,.1f} tokens per document"
            line += f", {split.characters / split.tokens:.2f} characters per token"
        lines.append(line)
    return [*lines, f"vocabulary: {folder.vocab_size:,} pieces", f"written to {folder.path}"]


def _tokenizer(corpus: Corpus, path: Path, options: TokenOptions) -> Tokenizer:
    """The tokenizer to use, in its place in the folder."""
    if not options.tokenizer:
        return train_tokenizer(corpus.training_sample(SAMPLE), options.vocab_size, path)
    tokenizer = Tokenizer(options.tokenizer)
    shutil.copyfile(options.tokenizer, path)
    return tokenizer


class _Encoder:
    """Tokenizes passages, in batches, in threads, in order."""

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._tokenizer = tokenizer
        self._bos = np.array([tokenizer.bos_id] * options.bos, np.int32)
        self._eos = np.array([tokenizer.eos_id] * options.eos, np.int32)
        self._workers = options.workers or os.cpu_count() or 1

    def encode_all(
        self, passages: Iterable[Assigned]
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
        """For batch after batch: its split, tokens, document starts and characters."""
        pending: collections.deque[Future[tuple[str, np.ndarray, np.ndarray, int]]]
        pending = collections.deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for split, batch in _batches(passages):
                    pending.append(pool.submit(self._encode, split, batch))
                    if len(pending) > 2 * self._workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _encode(self, split: str, batch: list[Passage]) -> tuple[str, np.ndarray, np.ndarray, int]:
        """The tokens of a batch, where documents start among them, and its characters."""
        parts: list[np.ndarray] = []
        starts, position = [], 0
        for passage in batch:
            ids = self._tokenizer.encode_array(passage.text, continues=not passage.is_first)
            if passage.is_first:
                starts.append(position)
                ids = np.concatenate([self._bos, ids])
            if passage.is_last:
                ids = np.concatenate([ids, self._eos])
            parts.append(ids)
            position += len(ids)
        characters = sum(len(passage.text) for passage in batch)
        return split, np.concatenate(parts), np.array(starts, np.int64), characters


def _batches(passages: Iterable[Assigned]) -> Iterator[tuple[str, list[Passage]]]:
    """Passages of the same split, gathered until they have `BATCH` characters."""
    batch: list[Passage] = []
    split, characters = "train", 0
    for its_split, passage in passages:
        if batch and (its_split != split or characters + len(passage.text) > BATCH):
            yield split, batch
            batch, characters = [], 0
        split = its_split
        batch.append(passage)
        characters += len(passage.text)
    if batch:
        yield split, batch
