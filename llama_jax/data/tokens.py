"""A token folder: the tokens of a corpus on disk, memory-mapped, with all that explains them.

    meta.json                    what follows, with counts, hashes and a fingerprint of it all
    tokenizer.model              the SentencePiece model that made the tokens
    train-00000.bin              tokens: uint16 (vocabulary up to 65,536) or uint32, little-endian
    train-00000.documents.npy    uint64: where in that shard documents start
    validation-00000.bin         ...

Documents follow one another, each after BOS or before EOS as meta.json says. All shards of a split
but the last have the same length, so a document may go on in the next. Knows neither text nor
batches; `token_writer` writes such folders.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import UserError

META, TOKENIZER = "meta.json", "tokenizer.model"
KIND, VERSION = "llama_jax tokens", 1
SPLITS: tuple[str, ...] = ("train", "validation")
AGAIN = "remove the folder and prepare it again"
WHOLE = 64 * 2**20  # bytes; a folder up to this size is checked whole when opened
SAMPLES, SAMPLE = 16, 2**16  # of larger ones, this many blocks of this many bytes of each shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens."""

    path: Path
    tokens: int
    documents: int  # that start in it
    sha256: str  # of the whole file
    sample_sha256: str  # of the blocks of `sample`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The training or validation part of a corpus."""

    tokens: int
    documents: int
    characters: int  # of the text that the tokens stand for
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # hashed as an object: a key of caches
class TokenFolder:
    """A token folder whose files have been checked; made by `TokenFolder.open`."""

    path: Path
    dtype: np.dtype[Any]  # of the tokens on disk
    vocab_size: int
    tokenizer_sha256: str
    bos: bool  # BOS stands before each document
    eos: bool  # EOS stands after each document
    source: str  # where the text came from, in words
    splits: Mapping[str, Split]  # "train" and "validation"
    fingerprint: str  # equal for two folders exactly if they hold the same tokens

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "TokenFolder":
        """Read a folder's description, and check its files against it.

        Folders up to 64 MiB are checked whole; of larger ones all sizes, and sampled blocks of
        every shard.

        Raises:
          UserError: if the folder is missing, damaged, or changed since it was written.
        """
        folder = _described(Path(path))
        tokenizer = folder.tokenizer_path
        if not tokenizer.is_file():
            raise UserError(f"{tokenizer} is missing; {AGAIN}")
        if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != folder.tokenizer_sha256:
            raise UserError(f"{tokenizer} is not the tokenizer of these tokens; {AGAIN}")
        shards = [shard for split in folder.splits.values() for shard in split.shards]
        for shard in shards:
            _check_size(folder, shard)
        is_small = sum(shard.tokens for shard in shards) * folder.dtype.itemsize <= WHOLE
        for shard in shards:
            _check_content(folder, shard, is_small)
        return folder

    @property
    def tokenizer_path(self) -> Path:
        """The SentencePiece model of the tokens."""
        return self.path / TOKENIZER

    def arrays(self, split: str) -> tuple[np.ndarray, ...]:
        """The tokens of each shard of a split, memory-mapped, read-only.

        Nobody may shorten the files while they are in use: the operating system then kills the
        reader (SIGBUS).
        """
        return tuple(
            np.memmap(shard.path, dtype=self.dtype, mode="r") for shard in self.splits[split].shards
        )

    def document_starts(self, split: str) -> tuple[np.ndarray, ...]:
        """For each shard of a split, the positions (uint64) at which documents start."""
        shards = self.splits[split].shards
        return tuple(np.load(starts_path(shard.path), mmap_mode="r") for shard in shards)


def starts_path(shard: Path) -> Path:
    """The file with the document starts of a shard."""
    return shard.with_suffix(".documents.npy")


def fingerprint(meta: Mapping[str, Any]) -> str:
    """The hash of a description without its own fingerprint and the words about the source."""
    told = {key: value for key, value in meta.items() if key not in ("fingerprint", "source")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def sample(path: Path) -> Iterator[tuple[int, bytes]]:
    """Blocks spread evenly over a file, first and last included, each with its position."""
    last = max(0, path.stat().st_size - SAMPLE + 7) // 8 * 8
    with path.open("rb") as stream:
        for index in range(SAMPLES):
            stream.seek(last * index // (SAMPLES - 1) // 8 * 8)
            yield stream.tell(), stream.read(SAMPLE)


def sample_hash(path: Path) -> str:
    """The hash of a file's `sample`."""
    return hashlib.sha256(b"".join(block for _, block in sample(path))).hexdigest()


def _described(path: Path) -> TokenFolder:
    """A folder as its meta.json describes it, unchecked."""
    make = f"make it with: python prepare.py TEXT --output {path}"
    if not (path / META).is_file():
        raise UserError(f"{path} has no {META}; {make}")
    damaged = f"{path / META} is damaged; {AGAIN}"
    try:
        meta = json.loads((path / META).read_bytes())
        if (meta["kind"], meta["version"]) != (KIND, VERSION):
            found = f"{meta['kind']!r} version {meta['version']!r}"
            raise UserError(f"{path / META} is {found}; expected {KIND!r} version {VERSION}")
        if fingerprint(meta) != meta["fingerprint"]:
            raise UserError(damaged)
        return TokenFolder(
            path=path,
            dtype=np.dtype(meta["dtype"]).newbyteorder("<"),
            vocab_size=meta["vocab_size"],
            tokenizer_sha256=meta["tokenizer_sha256"],
            bos=meta["bos"],
            eos=meta["eos"],
            source=meta["source"],
            splits={name: _split(path, meta["splits"][name]) for name in SPLITS},
            fingerprint=meta["fingerprint"],
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(damaged) from error


def _split(folder: Path, split: Mapping[str, Any]) -> Split:
    """A split from its part of meta.json."""
    shards = [
        Shard(path=folder / Path(shard["file"]).name, **{k: shard[k] for k in shard if k != "file"})
        for shard in split["shards"]
    ]
    return Split(**{**split, "shards": tuple(shards)})


def _check_size(folder: TokenFolder, shard: Shard) -> None:
    """Refuse a shard that is missing or not as long as its description says."""
    for path in (shard.path, starts_path(shard.path)):
        if not path.is_file():
            raise UserError(f"{path} is missing; {AGAIN}")
    size, expected = shard.path.stat().st_size, shard.tokens * folder.dtype.itemsize
    if size != expected:
        tokens = f"{shard.tokens:,} tokens of {folder.dtype.itemsize} bytes"
        raise UserError(f"{shard.path} has {size:,} bytes; expected {tokens}; {AGAIN}")


def _check_content(folder: TokenFolder, shard: Shard, whole: bool) -> None:
    """Refuse a shard with ids outside the vocabulary, or other than when it was written."""
    digest = hashlib.sha256()
    for start, block in [(0, shard.path.read_bytes())] if whole else sample(shard.path):
        tokens = np.frombuffer(block, folder.dtype)
        if len(tokens) and tokens.max() >= folder.vocab_size:
            at = int(np.argmax(tokens >= folder.vocab_size))
            where = f"id {tokens[at]} at position {start // folder.dtype.itemsize + at:,}"
            limit = f"the vocabulary ends at {folder.vocab_size - 1}"
            raise UserError(f"{shard.path} has {where}, but {limit}; {AGAIN}")
        digest.update(block)
    if digest.hexdigest() != (shard.sha256 if whole else shard.sample_sha256):
        raise UserError(f"{shard.path} is not what was written; {AGAIN}")
