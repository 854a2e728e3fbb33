"""Tokenization of a corpus into a token folder, in threads and in little memory.

The result does not depend on the number of workers: they tokenize batches of text
(the libraries release the GIL), and their results are written in order.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llama_jax.data.prepare.corpora import (
    STORIES,
    VALIDATION_FRACTION,
    AssignedChunk,
    Corpus,
    named_corpus,
)
from llama_jax.data.prepare.documents import Chunk, ReadProgress
from llama_jax.data.token_folder import SPLITS, TokenFolder, TokenWriter
from llama_jax.errors import UserError
from llama_jax.files import check_new_path, new_folder, new_path, progress
from llama_jax.text.sentencepiece import train_tokenizer
from llama_jax.text.tokenizer import MODEL, Tokenizer, load_tokenizer, save_tokenizer

BATCH_CHARACTERS = 2**18  # that a worker tokenizes at a time
SAMPLE_CHARACTERS = 64_000_000  # that a tokenizer is trained on, at most
VOCAB_SIZES = {"stories": 2048, "shakespeare": 2048}  # defaults of named corpora
Encoded = tuple[str, np.ndarray, np.ndarray, int]  # split, tokens, document starts, characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Settings of tokenization."""

    tokenizer: str = ""  # path of a tokenizer.model or tokenizer.json; empty: train one
    vocab_size: int = 4096  # of the tokenizer that is trained
    model_type: str = "bpe"  # of it: one of `text.sentencepiece.MODEL_TYPES`
    save_tokenizer: str = ""  # path of a copy of it; empty: it is in the folder only
    bos: bool = True  # put BOS before each document
    eos: bool = False  # put EOS after each document
    shard_tokens: int = 100_000_000  # tokens per file
    workers: int = 0  # threads; 0: one per core


def default_options(corpus: str) -> TokenOptions:
    """Return the default settings for a named corpus, or for any other text."""
    return TokenOptions(vocab_size=VOCAB_SIZES.get(corpus, TokenOptions.vocab_size))


def prepare_corpus(
    name: str,
    output: str | os.PathLike[str],
    options: TokenOptions | None = None,
    *,
    validation: float = VALIDATION_FRACTION,
    stories: int = STORIES,
) -> TokenFolder:
    """Write a named corpus to a new token folder; see `named_corpus` and `prepare`."""
    check_new_path(Path(output))
    corpus = named_corpus(name, validation=validation, stories=stories)
    return prepare(corpus, Path(output), options or default_options(name))


def prepare(
    corpus: Corpus, output: Path, options: TokenOptions, batch_characters: int = BATCH_CHARACTERS
) -> TokenFolder:
    """Tokenize a corpus into a new folder `output`, which appears only when it is complete.

    Raises:
      UserError: if the folder exists or cannot be written, the tokenizer is unusable or cannot be
        trained on this text, or the text is damaged.
    """
    with new_folder(output) as folder:
        tokenizer = _tokenizer(corpus, folder, options)
        writer = TokenWriter(folder, tokenizer.vocab_size, options.shard_tokens)
        state = ReadProgress()
        try:
            with progress("tokenizing", corpus.size, corpus.unit) as show:
                for encoded in encode(corpus.read(state), tokenizer, options, batch_characters):
                    writer.add(*encoded)
                    show(state.done)
            writer.finish(options.bos, options.eos, corpus.source)
        finally:
            writer.close()
    return TokenFolder.open(output)


def summary(folder: TokenFolder) -> list[str]:
    """Return lines that describe a token folder."""
    lines = []
    for name, split in folder.splits.items():
        line = f"{name}: {split.documents:,} documents, {split.tokens:,} tokens"
        if split.documents and split.tokens:
            line += f", {split.tokens / split.documents:,.1f} tokens per document"
            line += f", {split.characters / split.tokens:.2f} characters per token"
        lines.append(line)
    return [*lines, f"vocabulary: {folder.vocab_size:,} tokens", f"written to {folder.path}"]


def split_warning(folder: TokenFolder, validation: float) -> str:
    """Return a warning if the validation split is far from a fraction of the tokens, or ""."""
    held_out, training = folder.splits["validation"].tokens, folder.splits["train"].tokens
    fraction = held_out / max(1, held_out + training)
    if validation / 2 <= fraction <= validation * 2:
        return ""
    return (
        f"{100 * fraction:.3g}% of the tokens are held out for validation and"
        f" {100 * validation:.3g}% were requested, because there are few documents or some are very"
        " long; split them (--split_at) or change --validation"
    )


def _tokenizer(corpus: Corpus, folder: Path, options: TokenOptions) -> Tokenizer:
    """Train the tokenizer in `folder`, or copy it there, and return it."""
    if not options.tokenizer:
        sample = corpus.training_sample(SAMPLE_CHARACTERS)
        path = folder / MODEL
        with progress("training the tokenizer"):
            trained = train_tokenizer(sample, options.vocab_size, path, options.model_type)
        if options.save_tokenizer:
            with new_path(options.save_tokenizer) as copy:
                copy.write_bytes(path.read_bytes())
        return trained
    tokenizer = chosen_tokenizer(options)
    save_tokenizer(tokenizer.path.read_bytes(), folder)
    return tokenizer


def chosen_tokenizer(options: TokenOptions) -> Tokenizer:
    """Load the tokenizer that the options name.

    Raises:
      UserError: if it is unusable, or has no token that should stand between documents.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    for name, wanted, token in (
        ("bos", options.bos, tokenizer.bos_id),
        ("eos", options.eos, tokenizer.eos_id),
    ):
        if wanted and token < 0:
            also = " --eos" if name == "bos" and tokenizer.eos_id >= 0 else ""
            instead = f"--no-{name}{also}"
            raise UserError(f"{tokenizer.path} has no {name.upper()} token; use {instead}")
    return tokenizer


def encode(
    chunks: Iterable[AssignedChunk],
    tokenizer: Tokenizer,
    options: TokenOptions,
    batch_characters: int = BATCH_CHARACTERS,
) -> Iterator[Encoded]:
    """Yield for each batch of text its split, tokens, document starts and characters, in order.

    Reads only a few batches ahead of the results taken.
    """
    bos = np.array([tokenizer.bos_id] * options.bos, np.int32)
    eos = np.array([tokenizer.eos_id] * options.eos, np.int32)

    def encode_batch(split: str, batch: list[Chunk]) -> Encoded:
        parts: list[np.ndarray] = []
        starts, position = [], 0
        for chunk in batch:
            ids = tokenizer.encode_array(chunk.text, continues=not chunk.is_first)
            if chunk.is_first:
                starts.append(position)
                ids = np.concatenate([bos, ids])
            if chunk.is_last:
                ids = np.concatenate([ids, eos])
            parts.append(ids)
            position += len(ids)
        characters = sum(len(chunk.text) for chunk in batch)
        return split, np.concatenate(parts), np.array(starts, np.int64), characters

    workers = options.workers or os.cpu_count() or 1
    pending: collections.deque[Future[Encoded]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for split, batch in _batches(chunks, batch_characters):
                pending.append(pool.submit(encode_batch, split, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _batches(
    chunks: Iterable[AssignedChunk], batch_characters: int
) -> Iterator[tuple[str, list[Chunk]]]:
    """Group the chunks of each split, up to `batch_characters` together."""
    batches: dict[str, list[Chunk]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    for split, chunk in chunks:
        if batches[split] and characters[split] + len(chunk.text) > batch_characters:
            yield split, batches[split]
            batches[split], characters[split] = [], 0
        batches[split].append(chunk)
        characters[split] += len(chunk.text)
    for split, batch in batches.items():
        if batch:
            yield split, batch
