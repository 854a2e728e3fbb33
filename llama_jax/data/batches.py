"""Batches of token windows, in an order that is a pure function of (seed, step).

The only file that knows grain. Does not know the model, nor devices.

B: sequences in a batch, T: tokens in a sequence.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from llama_jax.data.tokens import TokenFolder
from llama_jax.errors import UsageError, UserError

READ_THREADS = 2
BATCHES_AHEAD = 8  # read before they are asked for
ENDLESS = 2**52  # windows in a run; grain's own endlessness overflows when batched by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences to learn from: predict each target from the inputs up to its place."""

    inputs_BT: Any  # int32; NumPy on the host, JAX once placed on devices
    targets_BT: Any  # int32, the inputs moved on by one token
    weights_BT: Any  # float32, what each target counts; 0 where there is none
    segments_BT: Any = None  # int32, each position's document in its row; none: not packed


class Windows:
    """All windows of up to T + 1 tokens at distance T in some arrays, none across two arrays.

    Consecutive windows share one token, so that every token but an array's first is a target once.
    """

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

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index` as int32, 2 to T + 1 tokens."""
        shard = bisect.bisect_right(self._ends, index)
        start = (index - (self._ends[shard - 1] if shard else 0)) * self._length
        return self._arrays[shard][start : start + self._length + 1].astype(np.int32)


def training_batches(
    folder: TokenFolder,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch]:
    """Endless batches of the training split, from `start_step` on, read ahead in threads.

    Every window is seen once in an epoch, in an order that the seed and the epoch decide; an
    incomplete window at the end of a shard is left out. The rows of step s over all processes, one
    process after another, are the same for any number of processes. Close the iterator when done.

    Args:
      batch_size: sequences in a step over all processes (B is this process's share).
      sequence_length: T.
      seed: of the order, from 0 to 2^32 - 1.
      start_step: the step of the first batch; going there costs nothing.
      process_index: which share of each batch this process gets.
      process_count: into how many shares a batch is cut.

    Raises:
      UserError: if the split is shorter than one window, or the batch cannot be shared out.
    """
    share = _share(batch_size, process_count)
    windows = Windows(folder.arrays("train"), sequence_length, keep_partial=False)
    if not len(windows):
        raise _too_short(folder, "train", sequence_length + 1)
    return _read_ahead(windows, share, seed, start_step, process_index, process_count)


def _read_ahead(
    windows: Windows, share: int, seed: int, start: int, process_index: int, process_count: int
) -> Generator[Batch]:
    """The batches of `training_batches`."""
    import grain

    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()[:ENDLESS]
    shares = dataset.batch(share, batch_fn=np.stack)[process_index::process_count][start:]
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    iterator = iter(shares.to_iter_dataset(options))
    try:
        for tokens in iterator:
            weights = np.ones((share, tokens.shape[1] - 1), np.float32)
            yield Batch(inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], weights_BT=weights)
    finally:
        iterator.close()


def validation_batches(
    folder: TokenFolder,
    *,
    batch_size: int,
    sequence_length: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The batches of the validation split, in order, the same every time.

    Every token but a shard's first is a target once. Windows and batches that would be incomplete
    are filled up with zeros of weight 0, so that all batches have the same shape.

    Args:
      batch_size: sequences in a batch over all processes (B is this process's share).
      sequence_length: T.
      limit: the number of batches; 0 or more than there are: all.
      process_index: which share of each batch this process gets.
      process_count: into how many shares a batch is cut.

    Raises:
      UserError: if the split has no target, or the batch cannot be shared out.
    """
    share = _share(batch_size, process_count)
    windows = Windows(folder.arrays("validation"), sequence_length, keep_partial=True)
    if not len(windows):
        raise _too_short(folder, "validation", 2)
    count = -(-len(windows) // batch_size)
    firsts = [
        step * batch_size + process_index * share for step in range(min(limit or count, count))
    ]
    return (_padded(windows, first, share, sequence_length) for first in firsts)


def _padded(windows: Windows, first: int, share: int, length: int) -> Batch:
    """The batch of windows from `first` on, with padding where there are none."""
    tokens = np.zeros((share, length + 1), np.int32)
    weights = np.zeros((share, length), np.float32)
    for row, index in enumerate(range(first, min(first + share, len(windows)))):
        window = windows[index]
        tokens[row, : len(window)] = window
        weights[row, : len(window) - 1] = 1
    return Batch(inputs_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], weights_BT=weights)


def _share(batch_size: int, process_count: int) -> int:
    """How many sequences of a batch one process gets."""
    if batch_size % process_count:
        raise UsageError(
            f"data.batch_size={batch_size} does not divide over {process_count} processes;"
            f" use a multiple of {process_count}"
        )
    return batch_size // process_count


def _too_short(folder: TokenFolder, split: str, needed: int) -> UserError:
    tokens = folder.splits[split].tokens
    return UserError(
        f"the {split} split of {folder.path} has {tokens:,} tokens, too few; expected at least"
        f" {needed:,} in one file: prepare more text, or shorten data.sequence_length"
    )
