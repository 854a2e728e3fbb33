"""Packs documents of many lengths into rows of one length, first fit.

A plan only: it takes lengths and tells which piece of which document stands in which row. Serves
training from scratch and fine-tuning alike. Knows neither tokens nor files; `rows` fills rows.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.config import PACKINGS
from llama_jax.data.token_folder import TokenFolder, document_starts
from llama_jax.errors import UsageError, UserError

OPEN_ROWS = 1024  # rows that a piece may still go into; part of what a seed's order means
SORTED = 1024  # pieces that are packed longest first; likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Which pieces of which documents stand in each row; made by `pack`.

    The pieces of a row stand side by side in the arrays, in the order of the documents.
    """

    row_length: int  # positions in a row (T)
    documents: np.ndarray  # int64, the document of each piece
    starts: np.ndarray  # int64, the document's token that is the piece's first input
    lengths: np.ndarray  # int64, positions that the piece takes, 1 to T; it has one token more
    ends: np.ndarray  # int64, for each row: pieces up to its end

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.ends)

    def __getitem__(self, row: int) -> list[tuple[int, int, int]]:
        """The pieces of a row, each as (document, start, length)."""
        end = int(self.ends[row])
        begin = int(self.ends[row - 1]) if row else 0
        columns = (self.documents, self.starts, self.lengths)
        return list(zip(*(column[begin:end].tolist() for column in columns)))

    @property
    def positions(self) -> int:
        """The positions filled in all rows: the number of targets."""
        return int(self.lengths.sum())

    @property
    def efficiency(self) -> float:
        """The share of positions filled, from 0 to 1."""
        return self.positions / (len(self) * self.row_length) if len(self) else 0.0


def pack(tokens_of_document: np.ndarray, row_length: int) -> Packing:
    """Plan rows for documents so that every token but a document's first is a target once.

    A document of n tokens takes n - 1 positions, each with an input and the token after it as the
    target. One with more than T is cut into pieces of T, which share a token, and a rest. A piece
    of T is a row; the others go, the longest of each 1,024 first, to the first of the 1,024 rows
    opened last that has room for them (first fit decreasing; Johnson, Near-optimal bin packing
    algorithms, 1973). Takes about 2 µs and 150 bytes a piece. Equal lengths give equal rows.

    Args:
      tokens_of_document: integers, the number of tokens of each document.
      row_length: T, at least 1.
    """
    documents, starts, lengths = _cut(np.asarray(tokens_of_document, np.int64), row_length)
    is_partial = lengths < row_length
    partial = np.flatnonzero(is_partial)
    order = _longest_first(lengths[partial])
    rows = np.empty(len(lengths), np.int64)
    rows[partial[order]] = first_fit(lengths[partial[order]], row_length)
    opened = int(np.max(rows[partial])) + 1 if len(partial) else 0
    rows[~is_partial] = np.arange(opened, opened + len(lengths) - len(partial))
    rows = _in_order_of_documents(rows)
    order = np.argsort(rows, kind="stable")
    return Packing(
        row_length=row_length,
        documents=documents[order],
        starts=starts[order],
        lengths=lengths[order],
        ends=np.cumsum(np.bincount(rows)) if len(rows) else rows,
    )


def first_fit(lengths: np.ndarray, row_length: int, open_rows: int = OPEN_ROWS) -> np.ndarray:
    """The row of each piece: the first of the rows opened last with room for it, or a new one.

    Args:
      lengths: integers from 1 to `row_length`.
      row_length: the room in a row.
      open_rows: how many rows are looked at, those opened last.
    """
    rooms, rows = np.zeros(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    count = 0
    for piece, length in enumerate(lengths.tolist()):
        first = max(0, count - open_rows)
        fits = rooms[first:count] >= length
        row = first + int(fits.argmax()) if count else 0
        if not count or not fits[row - first]:
            row, count = count, count + 1
            rooms[row] = row_length
        rooms[row] -= length
        rows[piece] = row
    return rows


def _cut(tokens: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, start and length of every piece, document by document."""
    targets = np.maximum(tokens - 1, 0)
    counts = -(-targets // row_length)
    documents = np.repeat(np.arange(len(tokens)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * row_length
    return documents, starts, np.minimum(targets[documents] - starts, row_length)


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The order of pieces in which each `SORTED` of them are from long to short."""
    return np.lexsort((-lengths, np.arange(len(lengths)) // SORTED))


def _in_order_of_documents(rows: np.ndarray) -> np.ndarray:
    """The same rows, numbered by the first piece in them."""
    _, firsts, numbers = np.unique(rows, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[numbers]


# Rows to learn from, by number: windows of a stream of tokens, or packed whole documents.
#
# Sources of random access, for any order of reading. Does not know batches, nor their order.
#
# T: positions in a row.


class Row(NamedTuple):
    """One sequence: predict each target from the inputs of its document up to its place."""

    inputs_T: np.ndarray  # int32
    targets_T: np.ndarray  # int32, the token after each input
    weights_T: np.ndarray  # float32, what each target counts; 0 where there is none
    segments_T: np.ndarray  # int32, the number of each position's piece from 1; 0: padding


def fill_row(
    pieces: Sequence[np.ndarray], length: int, weights: Sequence[np.ndarray] | None = None
) -> Row:
    """A row of T = `length` positions with pieces side by side, then zeros.

    Args:
      pieces: integers [n + 1] each: n positions, an input each and the token after it.
      length: T, at least all positions of the pieces together.
      weights: floats [n + 1] each, what each token counts as a target; the first is never one.
        Without: 1 each.
    """
    row = Row(*(np.zeros(length, kind) for kind in (np.int32, np.int32, np.float32, np.int32)))
    start = 0
    for number, tokens in enumerate(pieces):
        place = slice(start, start + len(tokens) - 1)
        row.inputs_T[place] = tokens[:-1]
        row.targets_T[place] = tokens[1:]
        row.weights_T[place] = 1 if weights is None else weights[number][1:]
        row.segments_T[place] = number + 1
        start = place.stop
    return row


class Windows:
    """All windows of up to T + 1 tokens at distance T in some arrays, none across two arrays.

    Consecutive windows share one token, so that every token but an array's first is a target once.
    """

    is_packed = False
    efficiency = 1.0  # the share of positions that have a target, partial windows left aside

    def __init__(
        self, arrays: tuple[np.ndarray, ...], sequence_length: int, keep_partial: bool
    ) -> None:
        """With `keep_partial`, the shorter window at an array's end is one too."""
        self._arrays = arrays
        self._length = sequence_length
        targets = [max(0, len(array) - 1) for array in arrays]
        counts = [
            -(-n // sequence_length) if keep_partial else n // sequence_length for n in targets
        ]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Window `index`, zeros after it if it is partial."""
        shard = bisect.bisect_right(self._ends, index)
        start = (index - (self._ends[shard - 1] if shard else 0)) * self._length
        return fill_row([self._arrays[shard][start : start + self._length + 1]], self._length)


class PackedDocuments:
    """All documents of a split, each with its own context, packed into rows of T positions.

    Documents that go on in the next file are whole again. Where documents end with no EOS, the BOS
    that follows one is its last target, or a model would not learn to end.
    """

    is_packed = True

    def __init__(self, folder: TokenFolder, split: str, sequence_length: int) -> None:
        """Plan the rows; takes seconds for a million documents.

        Raises:
          UserError: if the folder does not tell where documents start.
        """
        self._arrays = folder.arrays(split)
        self._ends = list(itertools.accumulate(len(array) for array in self._arrays))
        self._starts = document_starts(folder, split)
        total = self._ends[-1] if self._ends else 0
        tokens = np.diff(self._starts, append=total)
        if folder.bos and not folder.eos:
            tokens[:-1] += 1
        self.packing = pack(tokens, sequence_length)

    @property
    def efficiency(self) -> float:
        """The share of positions that have a target."""
        return self.packing.efficiency

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: int) -> Row:
        """Row `index`."""
        pieces = [
            self._read(int(self._starts[document]) + start, length + 1)
            for document, start, length in self.packing[index]
        ]
        return fill_row(pieces, self.packing.row_length)

    def _read(self, start: int, count: int) -> np.ndarray:
        """Tokens of the split from a position on, from as many files as they lie in."""
        shard = bisect.bisect_right(self._ends, start)
        start -= self._ends[shard - 1] if shard else 0
        parts = [self._arrays[shard][start : start + count]]
        missing = count - len(parts[0])
        while missing:
            shard += 1
            parts.append(self._arrays[shard][:missing])
            missing -= len(parts[-1])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


Rows = Windows | PackedDocuments


@functools.lru_cache(maxsize=4)  # validation asks again and again, and packing takes its time
def rows_of(folder: TokenFolder, split: str, sequence_length: int, packing: str) -> Rows:
    """The rows of a split; of windows, validation has the partial ones too.

    Raises:
      UsageError: if there are no such rows.
      UserError: if the split is shorter than a row (training) or has no target (validation).
    """
    if sequence_length < 1:
        raise UsageError(
            f"data.sequence_length={sequence_length} is out of range; expected at least 1"
        )
    if packing not in PACKINGS:
        expected = ", ".join(map(repr, PACKINGS))
        raise UsageError(f"data.packing={packing!r} is unknown; expected one of {expected}")
    needed = sequence_length if split == "train" else 1
    if packing == "documents":
        packed = PackedDocuments(folder, split, sequence_length)
        if packed.packing.positions < needed:
            found = f"{packed.packing.positions:,} tokens to predict within documents"
            raise _too_short(folder, split, found, f"{needed:,}")
        return packed
    windows = Windows(folder.arrays(split), sequence_length, keep_partial=split != "train")
    if not len(windows):
        found = f"{folder.splits[split].tokens:,} tokens"
        raise _too_short(folder, split, found, f"{needed + 1:,} in one file")
    return windows


def _too_short(folder: TokenFolder, split: str, found: str, expected: str) -> UserError:
    return UserError(
        f"the {split} split of {folder.path} has {found}, too few; expected at least"
        f" {expected}: prepare more text, or shorten data.sequence_length"
    )
