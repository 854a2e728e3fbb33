"""Training examples by index: windows of the token stream, or packed documents.

An example is one sequence of T tokens with its targets. Datasets are random access, so that the
loader can read them in any order.

T: positions in an example.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.config import PACKINGS
from llama_jax.data.token_folder import PREFERENCES, TEXT, TokenFolder
from llama_jax.errors import UsageError, UserError

OPEN_BINS = 1024  # bins that a piece may still be added to; changing it changes the data order
SORT_WINDOW = 1024  # pieces that are packed longest first; likewise


class Example(NamedTuple):
    """One sequence: predict each target from the inputs of its segment up to its position."""

    inputs_T: np.ndarray  # int32
    targets_T: np.ndarray  # int32, the token after each input
    weights_T: np.ndarray  # float32, weight of each target in the loss; 0: padding
    segments_T: np.ndarray  # int32, number of the packed piece, from 1; 0: padding


def make_example(
    pieces: Sequence[np.ndarray], length: int, weights: Sequence[np.ndarray] | None = None
) -> Example:
    """Return an example of T = `length` positions with the pieces side by side, then padding.

    Args:
      pieces: integers [n + 1] each, for n positions: an input each and the token after it.
      length: T, at least the positions of all pieces together.
      weights: floats [n + 1] each, the loss weight of each token as a target (the first token is
        never one); None: 1 each.
    """
    example = Example(
        *(np.zeros(length, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32))
    )
    start = 0
    for number, tokens in enumerate(pieces):
        span = slice(start, start + len(tokens) - 1)
        example.inputs_T[span] = tokens[:-1]
        example.targets_T[span] = tokens[1:]
        example.weights_T[span] = 1 if weights is None else weights[number][1:]
        example.segments_T[span] = number + 1
        start = span.stop
    return example


class WindowDataset:
    """Windows of T + 1 tokens, T apart, within each of several arrays.

    Consecutive windows share one token, so that every token but an array's first is a target once.
    """

    is_packed = False
    efficiency = 1.0  # fraction of positions that have a target, partial windows not counted

    def __init__(
        self, arrays: tuple[np.ndarray, ...], sequence_length: int, keep_partial: bool
    ) -> None:
        """Index the windows; with `keep_partial`, also the shorter one at the end of each array."""
        self._arrays = arrays
        self._length = sequence_length
        targets = [max(0, len(array) - 1) for array in arrays]
        counts = [
            -(-n // sequence_length) if keep_partial else n // sequence_length for n in targets
        ]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        shard = bisect.bisect_right(self._ends, index)
        start = (index - (self._ends[shard - 1] if shard else 0)) * self._length
        return make_example([self._arrays[shard][start : start + self._length + 1]], self._length)


class PackedDataset:
    """The documents of a split, packed into examples of T positions.

    A document may continue in the next file. Where documents do not end with EOS, the BOS of the
    next document is a document's last target, so that a model learns where documents end. Examples
    to fine-tune on are never cut, and a chosen and a rejected text stay side by side, as segments
    2k + 1 and 2k + 2.
    """

    is_packed = True

    def __init__(self, folder: TokenFolder, split: str, sequence_length: int) -> None:
        """Compute the packing; takes seconds for a million documents.

        Raises:
          UsageError: if an example is longer than a sequence.
          UserError: if the folder does not record where documents start.
        """
        self._arrays, self._masks = folder.arrays(split), folder.masks(split)
        self._ends = list(itertools.accumulate(len(array) for array in self._arrays))
        self._starts = folder.document_starts(split)
        self._group = 2 if folder.kind == PREFERENCES else 1  # documents that stay together
        tokens = np.diff(self._starts, append=self._ends[-1] if self._ends else 0)
        if folder.longest > sequence_length:
            raise UsageError(
                f"data.sequence_length={sequence_length} is shorter than the longest example of"
                f" {folder.path}; set it to at least {folder.longest}, or prepare the data again"
                f" with --sequence_length {sequence_length}"
            )
        if folder.kind == TEXT and folder.bos and not folder.eos:
            tokens[:-1] += 1
        self._tokens = tokens
        groups = (tokens - 1).reshape(-1, self._group).sum(axis=1) + 1
        self.packing = pack(groups, sequence_length)

    @property
    def efficiency(self) -> float:
        """Fraction of positions that have a target."""
        return self.packing.efficiency

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Example:
        spans = [
            (int(self._starts[document]) + start, length + 1)
            for document, start, length in self._pieces(index)
        ]
        pieces = [self._read(self._arrays, *span) for span in spans]
        weights = [self._read(self._masks, *span) for span in spans] if self._masks else None
        return make_example(pieces, self.packing.sequence_length, weights)

    def _pieces(self, index: int) -> list[tuple[int, int, int]]:
        """Return the pieces of an example, each as (document, start, length)."""
        if self._group == 1:
            return self.packing[index]
        groups = [group * self._group for group, _, _ in self.packing[index]]
        documents = [first + place for first in groups for place in range(self._group)]
        return [(document, 0, int(self._tokens[document]) - 1) for document in documents]

    def _read(self, arrays: Sequence[np.ndarray], start: int, count: int) -> np.ndarray:
        """Return `count` values from a position in the split, across files if necessary."""
        shard = bisect.bisect_right(self._ends, start)
        start -= self._ends[shard - 1] if shard else 0
        parts = [arrays[shard][start : start + count]]
        missing = count - len(parts[0])
        while missing:
            shard += 1
            parts.append(arrays[shard][:missing])
            missing -= len(parts[-1])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


Dataset = WindowDataset | PackedDataset


@functools.lru_cache(maxsize=64)  # each validation opens its split again, and packing is slow
def open_dataset(folder: TokenFolder, split: str, sequence_length: int, packing: str) -> Dataset:
    """Return the examples of a split; of windows, validation includes partial ones.

    Raises:
      UsageError: for a sequence length or packing out of range, or that would cut an example to
        fine-tune on.
      UserError: if the split has less than one full example (training) or no target (validation).
    """
    if sequence_length < 1:
        raise UsageError(
            f"data.sequence_length={sequence_length} is out of range; expected at least 1"
        )
    if packing not in PACKINGS:
        expected = ", ".join(map(repr, PACKINGS))
        raise UsageError(f"data.packing={packing!r} is unknown; expected one of {expected}")
    if folder.kind != TEXT and packing != "documents":
        raise UsageError(
            f"data.packing={packing!r} would cut the examples of {folder.path}; set"
            " --config.data.packing=documents"
        )
    needed = sequence_length if split == "train" and folder.kind == TEXT else 1
    if packing == "documents":
        packed = PackedDataset(folder, split, sequence_length)
        if packed.packing.positions < needed:
            found = f"{packed.packing.positions:,} tokens to predict within documents"
            raise _too_short(folder, split, found, f"{needed:,}")
        return packed
    windows = WindowDataset(folder.arrays(split), sequence_length, keep_partial=split != "train")
    if not len(windows):
        found = f"{folder.splits[split].tokens:,} tokens"
        raise _too_short(folder, split, found, f"{needed + 1:,} in one file")
    return windows


def _too_short(folder: TokenFolder, split: str, found: str, expected: str) -> UserError:
    return UserError(
        f"the {split} split of {folder.path} has only {found}; expected at least {expected}:"
        " prepare more text, or shorten data.sequence_length"
    )


# ---- packing: which piece of which document goes into which example ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """The pieces of documents in each example, in the order of the documents; made by `pack`."""

    sequence_length: int  # positions in an example (T)
    documents: np.ndarray  # int64, the document of each piece
    starts: np.ndarray  # int64, the document's token that is the piece's first input
    lengths: np.ndarray  # int64, positions that the piece takes, 1 to T; it has one token more
    ends: np.ndarray  # int64, for each example: number of pieces up to its end

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[tuple[int, int, int]]:
        """Return the pieces of an example, each as (document, start, length)."""
        end = int(self.ends[index])
        begin = int(self.ends[index - 1]) if index else 0
        columns = (self.documents, self.starts, self.lengths)
        return list(zip(*(column[begin:end].tolist() for column in columns)))

    @property
    def positions(self) -> int:
        """Positions filled in all examples, which is the number of targets."""
        return int(self.lengths.sum())

    @property
    def efficiency(self) -> float:
        """Fraction of positions filled, from 0 to 1."""
        return self.positions / (len(self) * self.sequence_length) if len(self) else 0.0


def pack(tokens_of_document: np.ndarray, sequence_length: int) -> Packing:
    """Return a packing in which every token but a document's first is a target exactly once.

    A document of n tokens takes n - 1 positions, each with an input and the token after it as the
    target. One with more than T positions is cut into pieces of T, which overlap in one token, and
    a rest. A piece of T is an example by itself. The others, the longest of each 1,024 first, go
    into the first of the 1,024 examples opened last that has room (first fit decreasing; Johnson,
    Near-optimal bin packing algorithms, 1973). Takes about 2 µs and 150 bytes per piece.
    Deterministic.

    Args:
      tokens_of_document: integers, the number of tokens of each document.
      sequence_length: T, at least 1.
    """
    tokens = np.asarray(tokens_of_document, np.int64)
    documents, starts, lengths = _cut_documents(tokens, sequence_length)
    is_full = lengths == sequence_length
    partial = np.flatnonzero(~is_full)
    window = np.arange(len(partial)) // SORT_WINDOW
    partial = partial[np.lexsort((-lengths[partial], window))]
    bins = np.empty(len(lengths), np.int64)
    bins[partial] = first_fit(lengths[partial], sequence_length)
    opened = int(np.max(bins[partial])) + 1 if len(partial) else 0
    bins[is_full] = np.arange(opened, opened + len(lengths) - len(partial))
    _, firsts, numbers = np.unique(bins, return_index=True, return_inverse=True)
    bins = np.argsort(np.argsort(firsts))[numbers]  # numbered by the first piece in each
    order = np.argsort(bins, kind="stable")
    return Packing(
        sequence_length=sequence_length,
        documents=documents[order],
        starts=starts[order],
        lengths=lengths[order],
        ends=np.cumsum(np.bincount(bins)) if len(bins) else bins,
    )


def first_fit(lengths: np.ndarray, capacity: int, open_bins: int = OPEN_BINS) -> np.ndarray:
    """Return the bin of each piece: the first open one with room for it, or a new one.

    Args:
      lengths: integers from 1 to `capacity`.
      capacity: of each bin.
      open_bins: only this many bins are searched, those opened last.
    """
    bins = np.empty(len(lengths), np.int64)
    room = np.empty(len(lengths), np.int64)
    count = 0
    for piece, length in enumerate(lengths.tolist()):
        first = max(0, count - open_bins)
        fits = room[first:count] >= length
        index = first + int(fits.argmax()) if count else 0
        if not count or not fits[index - first]:
            index, count = count, count + 1
            room[index] = capacity
        room[index] -= length
        bins[piece] = index
    return bins


def _cut_documents(
    tokens: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return document, start and length of every piece, document by document."""
    targets = np.maximum(tokens - 1, 0)
    counts = -(-targets // sequence_length)
    documents = np.repeat(np.arange(len(tokens)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * sequence_length
    return documents, starts, np.minimum(targets[documents] - starts, sequence_length)
