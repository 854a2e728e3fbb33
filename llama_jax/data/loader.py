"""Batches of rows of tokens, in an order that is a pure function of (seed, step).

The only file that knows grain. Does not know the model, nor devices.

B: sequences in a batch, T: tokens in a sequence.
"""

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.config import Config
from llama_jax.data.sequences import Row, Rows, fill_row, rows_of
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.mesh import batch_sharding
from llama_jax.errors import UsageError

READ_THREADS = 2
BATCHES_AHEAD = 8  # read before they are asked for
ENDLESS = 2**52  # rows in a run; grain's own endlessness overflows when batched by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences to learn from: predict each target from the inputs up to its place."""

    inputs_BT: Any  # int32; NumPy on the host, JAX once placed on devices
    targets_BT: Any  # int32, the token after each input
    weights_BT: Any  # float32, what each target counts; 0 where there is none
    segments_BT: Any = None  # int32, each position's document from 1, 0: none; None: not packed


def abstract_batch(config: Config) -> Batch:
    """The shapes and dtypes of a whole step's batch, to compile for before there is any data."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    return Batch(
        inputs_BT=tokens,
        targets_BT=tokens,
        weights_BT=jax.ShapeDtypeStruct(shape, np.float32),
        segments_BT=tokens if config.data.packing == "documents" else None,
    )


class TrainingBatches(Iterator[Batch]):
    """Endless batches of a training split; close it when done."""

    def __init__(self, batches: Generator[Batch], rows: int, efficiency: float) -> None:
        self._batches = batches
        self.rows = rows  # in an epoch
        self.efficiency = efficiency  # the share of positions that have a target

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()


def training_batches(
    folder: TokenFolder,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    packing: str = "none",
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatches:
    """Endless batches of the training split, from `start_step` on, read ahead in threads.

    Every row is seen once in an epoch, in an order that the seed and the epoch decide. The rows of
    step s over all processes, one process after another, are the same for any number of processes.

    Args:
      batch_size: sequences in a step over all processes (B is this process's share).
      sequence_length: T.
      seed: of the order, from 0 to 2^32 - 1.
      packing: what a row is. "none": T + 1 tokens of a file, wherever documents start; what is left
        at the end of a file is left out. "documents": whole documents, none of which sees another.
      start_step: the step of the first batch; going there costs nothing.
      process_index: which share of each batch this process gets.
      process_count: into how many shares a batch is cut.

    Raises:
      UserError: if the split is shorter than one row, or the batch cannot be shared out.
    """
    share = _share(batch_size, process_count)
    rows = rows_of(folder, "train", sequence_length, packing)
    batches = _read_ahead(rows, share, seed, start_step, process_index, process_count)
    return TrainingBatches(batches, len(rows), rows.efficiency)


def _read_ahead(
    rows: Rows, share: int, seed: int, start: int, process_index: int, process_count: int
) -> Generator[Batch]:
    """The batches of `training_batches`."""
    import grain

    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()[:ENDLESS]
    batches = dataset.batch(share, batch_fn=partial(_batch, is_packed=rows.is_packed))
    shares = batches[process_index::process_count][start:]
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    iterator = iter(shares.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def validation_batches(
    folder: TokenFolder,
    *,
    batch_size: int,
    sequence_length: int,
    packing: str = "none",
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The batches of the validation split, in order, the same every time.

    Every token but a file's first (packed: but a document's first) is a target once. Rows and
    batches that would be incomplete are filled up with zeros of weight 0, so that all batches have
    the same shape.

    Args:
      batch_size: sequences in a batch over all processes (B is this process's share).
      sequence_length: T.
      packing: what a row is; see `training_batches`.
      limit: the number of batches; 0 or more than there are: all.
      process_index: which share of each batch this process gets.
      process_count: into how many shares a batch is cut.

    Raises:
      UserError: if the split has no target, or the batch cannot be shared out.
    """
    share = _share(batch_size, process_count)
    rows = rows_of(folder, "validation", sequence_length, packing)
    count = -(-len(rows) // batch_size)
    firsts = range(process_index * share, min(limit or count, count) * batch_size, batch_size)
    blank = fill_row([], sequence_length)
    return (
        _batch(
            [rows[i] if i < len(rows) else blank for i in range(first, first + share)],
            rows.is_packed,
        )
        for first in firsts
    )


def _batch(rows: Sequence[Row], is_packed: bool) -> Batch:
    """Rows one under another."""
    inputs_BT, targets_BT, weights_BT, segments_BT = (np.stack(column) for column in zip(*rows))
    return Batch(
        inputs_BT=inputs_BT,
        targets_BT=targets_BT,
        weights_BT=weights_BT,
        segments_BT=segments_BT if is_packed else None,
    )


def _share(batch_size: int, process_count: int) -> int:
    """How many sequences of a batch one process gets."""
    if batch_size % process_count:
        raise UsageError(
            f"data.batch_size={batch_size} does not divide over {process_count} processes;"
            f" use a multiple of {process_count}"
        )
    return batch_size // process_count


# The rows of a batch that each process reads: those its own devices hold, whatever the mesh.
#
# Where an axis that does not cut the batch (tensor) spans processes, several processes hold the
# same
# rows and each of them reads them. Does not know where rows come from.

Read = Callable[..., Iterator[Batch]]  # takes process_index and process_count: which share to read


def first_rows(
    sharding: NamedSharding, batch_size: int, devices: Collection[jax.Device]
) -> list[int]:
    """Where the parts of a batch that these devices hold begin, ascending; all are equally long."""
    places = sharding.devices_indices_map((batch_size,))
    return sorted({places[device][0].start or 0 for device in devices})


def shares(firsts: list[int], length: int, batch_size: int) -> list[tuple[int, int]]:
    """The fewest shares of a batch, each as (index, count), that are these parts in this order.

    Args:
      firsts: the first rows of some parts, ascending.
      length: the rows of a part; the batch is a multiple of it.
    """
    index, rows = firsts[0], len(firsts) * length
    is_one_share = firsts == list(range(index, index + rows, length))
    if is_one_share and index % rows == 0 and batch_size % rows == 0:
        return [(index // rows, batch_size // rows)]
    return [(first // length, batch_size // length) for first in firsts]


class GlobalBatches(Iterator[Batch]):
    """Whole batches on a mesh, of which this process reads the rows of its devices alone."""

    def __init__(self, read: Read, batch_size: int, mesh: Mesh):
        """Open what is to be read.

        Args:
          read: batches as of `training_batches`, given `process_index` and `process_count`.
          batch_size: rows of a batch over all processes.
        """
        self._sharding, self._batch_size = batch_sharding(mesh), batch_size
        (self._length,) = self._sharding.shard_shape((batch_size,))
        self._firsts = first_rows(self._sharding, batch_size, self._sharding.addressable_devices)
        self._sources = [
            read(process_index=index, process_count=count)
            for index, count in shares(self._firsts, self._length, batch_size)
        ]

    def __next__(self) -> Batch:
        parts = [next(source) for source in self._sources]
        whole = len(parts) == 1
        batch = parts[0] if whole else jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        if jax.process_count() == 1:
            return jax.device_put(batch, self._sharding)
        return jax.tree.map(self._placed, batch)

    def _placed(self, rows: np.ndarray) -> jax.Array:
        """A global array, made of this process's rows on this process's devices."""

        def part(index: Any) -> np.ndarray:
            start = self._firsts.index(index[0].start or 0) * self._length
            return rows[start : start + self._length]

        shape = (self._batch_size, *rows.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, part)

    def close(self) -> None:
        """Stop reading."""
        for source in self._sources:
            if hasattr(source, "close"):
                source.close()


# The batches of a run, as its config wants them, on the devices of its mesh.


def load_training_batches(
    config: Config, data: TokenFolder, mesh: Mesh, step: int
) -> GlobalBatches:
    """Those of the steps after this one; they never end."""
    read = partial(
        training_batches,
        data,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.data.seed,
        packing=config.data.packing,
        start_step=step,
    )
    return GlobalBatches(read, config.data.batch_size, mesh)


def load_validation_batches(config: Config, data: TokenFolder, mesh: Mesh) -> GlobalBatches:
    """Those of a validation, the same at each, as large as a microbatch.

    Raises:
      UserError: when the text held back is too short for one.
    """
    read = partial(
        validation_batches,
        data,
        batch_size=config.microbatch_size,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        limit=config.run.eval_batches,
    )
    return GlobalBatches(read, config.microbatch_size, mesh)
