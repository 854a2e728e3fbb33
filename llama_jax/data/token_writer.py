"""Writes a token folder (see `tokens`), shard by shard, in little memory.

Does not know where the tokens come from, nor how the folder gets its final name.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_jax.data.tokens import (
    KIND,
    META,
    SPLITS,
    TOKENIZER,
    VERSION,
    fingerprint,
    sample_hash,
    starts_path,
)

LARGEST_UINT16_VOCAB = 2**16  # pieces


@dataclasses.dataclass
class _OpenShard:
    """The shard that a split is being written to."""

    path: Path
    stream: BinaryIO
    digest: Any
    tokens: int = 0
    starts: list[np.ndarray] = dataclasses.field(default_factory=list)


class TokenWriter:
    """Takes tokens in order and leaves shards; `finish` writes the description."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        """Write to an existing folder that already has its tokenizer; shards of `shard_tokens`."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= LARGEST_UINT16_VOCAB else "<u4")
        self._shard_tokens = shard_tokens
        self._open: dict[str, _OpenShard] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._characters = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, tokens: np.ndarray, starts: np.ndarray, characters: int) -> None:
        """Append tokens to a split; documents start at the positions `starts` among them."""
        self._characters[split] += characters
        while len(tokens):
            shard = self._open.get(split) or self._new_shard(split)
            room = self._shard_tokens - shard.tokens
            data = tokens[:room].astype(self._dtype).tobytes()
            shard.stream.write(data)
            shard.digest.update(data)
            shard.starts.append(starts[starts < room] + shard.tokens)
            shard.tokens += min(room, len(tokens))
            tokens, starts = tokens[room:], starts[starts >= room] - room
            if shard.tokens == self._shard_tokens:
                self._close_shard(split)

    def finish(self, bos: bool, eos: bool, source: str) -> None:
        """Close the shards and write meta.json, which makes the folder complete."""
        for split in list(self._open):
            self._close_shard(split)
        tokenizer = (self._folder / TOKENIZER).read_bytes()
        meta = {
            "kind": KIND,
            "version": VERSION,
            "source": source,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
            "bos": bos,
            "eos": eos,
            "splits": {split: self._totals(split) for split in SPLITS},
        }
        meta["fingerprint"] = fingerprint(meta)
        (self._folder / META).write_text(json.dumps(meta, indent=2) + "\n")

    def close(self) -> None:
        """Let go of open files; for a writer that will not finish."""
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
        np.save(starts_path(shard.path), starts)
        self._shards[split].append(
            {
                "file": shard.path.name,
                "tokens": shard.tokens,
                "documents": len(starts),
                "sha256": shard.digest.hexdigest(),
                "sample_sha256": sample_hash(shard.path),
            }
        )

    def _totals(self, split: str) -> dict[str, Any]:
        shards = self._shards[split]
        return {
            "tokens": sum(shard["tokens"] for shard in shards),
            "documents": sum(shard["documents"] for shard in shards),
            "characters": self._characters[split],
            "shards": shards,
        }
