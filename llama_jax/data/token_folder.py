"""Token folders: the tokens of a corpus on disk, read memory-mapped.

    meta.json                    counts, hashes and settings, and a fingerprint of them
    tokenizer.model              what made the tokens; or tokenizer.json
    train-00000.bin              tokens: uint16 (vocabulary up to 65,536) or uint32, little-endian
    train-00000.documents.npy    uint64: positions in that shard at which documents start
    train-00000.mask.bin         uint8: loss weight of each token, 0 or 1; of examples only
    validation-00000.bin         ...

Documents are concatenated, each after BOS or before EOS as meta.json says. All shards of a split
but the last have the same length, so a document may continue in the next shard. A folder of
examples has one per document, with loss weights; in one of preferences, a chosen text and the
rejected one are two documents in turn.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import tokenizer_path

META = "meta.json"
KIND, VERSION, VERSION_WITH_MASKS = "llama_jax tokens", 1, 2
KINDS = TEXT, DIALOGUES, PREFERENCES = "text", "dialogues", "preferences"  # what documents are
SPLITS: tuple[str, ...] = ("train", "validation")
# Folders without hashes of the document starts keep the fingerprint that runs have recorded.
UNHASHED = ("fingerprint", "source", "documents_sha256")
AGAIN = "remove the folder and prepare it again"
LARGEST_UINT16_VOCAB = 2**16  # tokens
FULL_CHECK_BYTES = 64 * 2**20  # folders up to this size are read and checked in full when opened
SAMPLE_BLOCKS, BLOCK_BYTES = 16, 2**16  # of each shard of larger folders, which are checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens."""

    path: Path
    tokens: int
    documents: int  # that start in it
    sha256: str  # of the file
    sample_sha256: str  # of the blocks of `sample_blocks`
    documents_sha256: str = ""  # of the file of document starts; "": older folders do not have it
    mask_sha256: str = ""  # of the file of loss weights; "": there is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The training or validation part of a corpus."""

    tokens: int
    documents: int
    characters: int  # of the text
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # hashed as an object: a key of caches
class TokenFolder:
    """An opened token folder, whose files have been checked."""

    path: Path
    dtype: np.dtype[Any]  # of the tokens on disk
    vocab_size: int
    tokenizer_sha256: str
    bos: bool  # BOS stands before each document
    eos: bool  # EOS stands after each document
    source: str  # description of where the text came from
    splits: Mapping[str, Split]  # "train" and "validation"
    fingerprint: str  # equal for two folders if and only if they hold the same tokens
    kind: str = TEXT  # or, with loss weights, `DIALOGUES` or `PREFERENCES`
    chat_template: str = ""  # of dialogues: a name of `text.chat_formats`, or a Jinja template
    longest: int = 0  # positions in a sequence that the longest example takes; 0: text

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], full_check_bytes: int = FULL_CHECK_BYTES
    ) -> "TokenFolder":
        """Read a folder's meta.json and check its files against it.

        Folders up to `full_check_bytes` are checked in full; of larger ones, all sizes and sampled
        blocks of every shard, and the document starts when they are read.

        Raises:
          UserError: if the folder is missing, damaged, or changed since it was written.
        """
        folder = _read_meta(Path(path))
        tokenizer = folder.tokenizer_path
        if not tokenizer.is_file():
            raise UserError(f"{tokenizer} is missing; {AGAIN}")
        if _file_sha256(tokenizer) != folder.tokenizer_sha256:
            raise UserError(f"{tokenizer} is not the tokenizer of these tokens; {AGAIN}")
        shards = [shard for split in folder.splits.values() for shard in split.shards]
        for shard in shards:
            _check_size(folder, shard)
        size = sum(shard.tokens for shard in shards) * folder.dtype.itemsize
        is_full = size <= full_check_bytes
        for shard in shards:
            _check_content(folder, shard, is_full)
            if is_full:
                _read_starts(shard)
            if folder.kind != TEXT and _file_sha256(mask_path(shard.path)) != shard.mask_sha256:
                raise UserError(
                    f"{mask_path(shard.path)} has changed since it was written; {AGAIN}"
                )
        return folder

    @property
    def tokenizer_path(self) -> Path:
        """The file of the tokenizer that made the tokens."""
        return tokenizer_path(self.path)

    def arrays(self, split: str) -> tuple[np.ndarray, ...]:
        """Return the tokens of each shard of a split, memory-mapped and read-only.

        The files must not be truncated while in use: the operating system would kill the reader
        (SIGBUS).
        """
        return tuple(
            np.memmap(shard.path, dtype=self.dtype, mode="r") for shard in self.splits[split].shards
        )

    def masks(self, split: str) -> tuple[np.ndarray, ...]:
        """Return the loss weights of each shard of a split, 0 or 1 per token; none of text."""
        shards = self.splits[split].shards if self.kind != TEXT else ()
        return tuple(np.memmap(mask_path(shard.path), np.uint8, mode="r") for shard in shards)

    def document_starts(self, split: str) -> np.ndarray:
        """Return the positions at which documents start in a split, over all its files, as int64.

        Raises:
          UserError: if the folder does not record them, or they have changed since.
        """
        positions, before = [np.zeros(0, np.int64)], 0
        for shard in self.splits[split].shards:
            positions.append(_read_starts(shard) + before)
            before += shard.tokens
        starts = np.concatenate(positions)
        if before and starts[:1].tolist() != [0]:
            raise UserError(
                f"the {split} split of {self.path} does not say where its documents start, so they"
                " cannot be packed; prepare it again, or set --config.data.packing=none"
            )
        return starts


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype in which tokens of a vocabulary are stored."""
    return np.dtype("<u2" if vocab_size <= LARGEST_UINT16_VOCAB else "<u4")


def starts_path(shard: Path) -> Path:
    """Return the path of a shard's document starts."""
    return shard.with_suffix(".documents.npy")


def mask_path(shard: Path) -> Path:
    """Return the path of the loss weights of a shard's tokens."""
    return shard.with_suffix(".mask.bin")


def fingerprint(meta: Mapping[str, Any]) -> str:
    """Return the hash of a meta.json's contents, except for the keys in `UNHASHED`."""

    def hashed(value: dict[str, Any]) -> dict[str, Any]:
        return {key: value[key] for key in value if key not in UNHASHED}

    content = json.loads(json.dumps(meta), object_hook=hashed)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sample_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) of blocks spread evenly over a file, including both ends."""
    last = max(0, path.stat().st_size - BLOCK_BYTES + 7) // 8 * 8
    with path.open("rb") as stream:
        for index in range(SAMPLE_BLOCKS):
            stream.seek(last * index // (SAMPLE_BLOCKS - 1) // 8 * 8)
            yield stream.tell(), stream.read(BLOCK_BYTES)


def _read_meta(path: Path) -> TokenFolder:
    """Return a folder as described by its meta.json, before its files are checked."""
    make = f"create it with: python prepare.py TEXT --output {path}"
    if not (path / META).is_file():
        raise UserError(f"{path} has no {META}; {make}")
    damaged = f"{path / META} is damaged; {AGAIN}"
    try:
        meta = json.loads((path / META).read_bytes())
        version = VERSION_WITH_MASKS if "examples" in meta else VERSION
        if (meta["kind"], meta["version"]) != (KIND, version):
            found = f"{meta['kind']!r} version {meta['version']!r}"
            raise UserError(f"{path / META} is {found}; expected {KIND!r} version {version}")
        if fingerprint(meta) != meta["fingerprint"]:
            raise UserError(damaged)
        if (examples := meta.get("examples", {})) and examples["kind"] not in KINDS:
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
            **examples,
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(damaged) from error


def _split(folder: Path, split: Mapping[str, Any]) -> Split:
    """Return a split from its entry in meta.json."""
    shards = [
        Shard(path=folder / Path(shard["file"]).name, **{k: shard[k] for k in shard if k != "file"})
        for shard in split["shards"]
    ]
    return Split(**{**split, "shards": tuple(shards)})


def _check_size(folder: TokenFolder, shard: Shard) -> None:
    """Raise `UserError` for a shard that is missing or of the wrong length."""
    masks = [mask_path(shard.path)] if folder.kind != TEXT else []
    for path in (shard.path, starts_path(shard.path), *masks):
        if not path.is_file():
            raise UserError(f"{path} is missing; {AGAIN}")
    size, expected = shard.path.stat().st_size, shard.tokens * folder.dtype.itemsize
    if size != expected:
        tokens = f"{shard.tokens:,} tokens of {folder.dtype.itemsize} bytes"
        raise UserError(f"{shard.path} has {size:,} bytes; expected {tokens}; {AGAIN}")


def _check_content(folder: TokenFolder, shard: Shard, full: bool) -> None:
    """Raise `UserError` for a shard that has changed or has ids outside the vocabulary."""
    digest = hashlib.sha256()
    for start, block in [(0, shard.path.read_bytes())] if full else sample_blocks(shard.path):
        tokens = np.frombuffer(block, folder.dtype)
        if len(tokens) and tokens.max() >= folder.vocab_size:
            at = int(np.argmax(tokens >= folder.vocab_size))
            where = f"id {tokens[at]} at position {start // folder.dtype.itemsize + at:,}"
            limit = f"the vocabulary ends at {folder.vocab_size - 1}"
            raise UserError(f"{shard.path} has {where}, but {limit}; {AGAIN}")
        digest.update(block)
    if digest.hexdigest() != (shard.sha256 if full else shard.sample_sha256):
        raise UserError(f"{shard.path} has changed since it was written; {AGAIN}")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_starts(shard: Shard) -> np.ndarray:
    """Return the positions at which documents start in one file, as int64, after checking them."""
    path = starts_path(shard.path)
    is_valid = shard.documents_sha256 in ("", _file_sha256(path))
    if is_valid:
        try:
            starts = np.load(path)
            is_valid = (starts.dtype, starts.shape) == (np.dtype("<u8"), (shard.documents,))
        except Exception:  # a damaged header fails in NumPy's parser in many ways
            is_valid = False
    if is_valid:
        starts = starts.astype(np.int64)
        is_valid = bool((np.diff(starts, prepend=-1, append=shard.tokens) > 0).all())
    if not is_valid:
        raise UserError(f"{path} has changed since it was written; {AGAIN}")
    return starts


# ---- writing ----


@dataclasses.dataclass
class _OpenShard:
    """The shard of a split that is being written."""

    path: Path
    stream: BinaryIO
    digest: Any
    tokens: int = 0
    starts: list[np.ndarray] = dataclasses.field(default_factory=list)
    masks: list[np.ndarray] = dataclasses.field(default_factory=list)


class TokenWriter:
    """Writes a token folder shard by shard; `finish` writes meta.json, which completes it."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        """Start writing to a folder that has its tokenizer, in shards of `shard_tokens`."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._open: dict[str, _OpenShard] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._characters = dict.fromkeys(SPLITS, 0)

    def add(
        self,
        split: str,
        tokens: np.ndarray,
        starts: np.ndarray,
        characters: int,
        mask: np.ndarray | None = None,
    ) -> None:
        """Append tokens to a split.

        Args:
          split: "train" or "validation".
          tokens: integers [n].
          starts: the positions among them at which documents start.
          characters: of the text that they encode.
          mask: the loss weight of each token, 0 or 1, if the folder is to have them.
        """
        self._characters[split] += characters
        while len(tokens):
            shard = self._open.get(split) or self._new_shard(split)
            room = self._shard_tokens - shard.tokens
            data = tokens[:room].astype(self._dtype).tobytes()
            shard.stream.write(data)
            shard.digest.update(data)
            shard.starts.append(starts[starts < room] + shard.tokens)
            if mask is not None:
                shard.masks.append(mask[:room].astype(np.uint8))
                mask = mask[room:]
            shard.tokens += min(room, len(tokens))
            tokens, starts = tokens[room:], starts[starts >= room] - room
            if shard.tokens == self._shard_tokens:
                self._close_shard(split)

    def finish(
        self,
        bos: bool,
        eos: bool,
        source: str,
        kind: str = TEXT,
        chat_template: str = "",
        longest: int = 0,
    ) -> None:
        """Close the shards and write meta.json; arguments as the fields of `TokenFolder`."""
        for split in list(self._open):
            self._close_shard(split)
        meta = {
            "kind": KIND,
            "version": VERSION if kind == TEXT else VERSION_WITH_MASKS,
            "source": source,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "tokenizer_sha256": _file_sha256(tokenizer_path(self._folder)),
            "bos": bos,
            "eos": eos,
            "splits": {split: self._totals(split) for split in SPLITS},
        }
        if kind != TEXT:
            meta["examples"] = {"kind": kind, "chat_template": chat_template, "longest": longest}
        meta["fingerprint"] = fingerprint(meta)
        (self._folder / META).write_text(json.dumps(meta, indent=2) + "\n")

    def close(self) -> None:
        """Close open files, after an error."""
        for shard in self._open.values():
            shard.stream.close()

    def _new_shard(self, split: str) -> _OpenShard:
        path = self._folder / f"{split}-{len(self._shards[split]):05d}.bin"
        self._open[split] = _OpenShard(path, path.open("wb"), hashlib.sha256())
        return self._open[split]

    def _close_shard(self, split: str) -> None:
        shard = self._open.pop(split)
        shard.stream.close()
        starts = np.concatenate(shard.starts).astype("<u8")
        sampled = b"".join(block for _, block in sample_blocks(shard.path))
        np.save(starts_path(shard.path), starts)
        if shard.masks:
            mask_path(shard.path).write_bytes(np.concatenate(shard.masks).tobytes())
        self._shards[split].append(
            {
                "file": shard.path.name,
                "tokens": shard.tokens,
                "documents": len(starts),
                "sha256": shard.digest.hexdigest(),
                "sample_sha256": hashlib.sha256(sampled).hexdigest(),
                "documents_sha256": _file_sha256(starts_path(shard.path)),
            }
            | ({"mask_sha256": _file_sha256(mask_path(shard.path))} if shard.masks else {})
        )

    def _totals(self, split: str) -> dict[str, Any]:
        shards = self._shards[split]
        sums = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
        return sums | {"characters": self._characters[split], "shards": shards}
