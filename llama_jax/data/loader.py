"""Batches of token folders, from disk to the devices of a mesh.

The order of the training examples, and the source of each, are pure functions of (seed, step): they
depend neither on the number of processes nor on where a run was resumed. Each process reads only
the sequences that its own devices hold.

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
from llama_jax.data.datasets import Example, make_example, open_dataset
from llama_jax.data.sources import Sources, source_of
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.mesh import batch_sharding
from llama_jax.errors import UsageError

READ_THREADS = 2
PREFETCH_BATCHES = 8
ENDLESS = 2**52  # examples in a run; grain's own endless repetition overflows with batch size 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences to learn from: predict each target from the inputs up to its position."""

    inputs_BT: Any  # int32; NumPy on the host, JAX on devices
    targets_BT: Any  # int32, the token after each input
    weights_BT: Any  # float32, weight of each target in the loss; 0: padding
    segments_BT: Any = None  # int32, document of each position from 1, 0: padding; None: not packed


def abstract_batch(config: Config) -> Batch:
    """Return the shapes and dtypes of a step's batch, to compile without data."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    return Batch(
        inputs_BT=tokens,
        targets_BT=tokens,
        weights_BT=jax.ShapeDtypeStruct(shape, np.float32),
        segments_BT=tokens if config.data.packing == "documents" else None,
    )


# ---- a run's batches, on the devices of its mesh ----


def load_training_batches(
    config: Config, data: TokenFolder | Sources, mesh: Mesh, step: int
) -> "GlobalBatches":
    """Return the endless batches of the steps after `step`."""
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


def load_validation_batches(config: Config, data: TokenFolder, mesh: Mesh) -> "GlobalBatches":
    """Return the batches of one validation, each as large as a microbatch; the same every time.

    Raises:
      UserError: if the validation split has no target.
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


ReadShard = Callable[..., Iterator[Batch]]  # takes shard_index and shard_count


class GlobalBatches(Iterator[Batch]):
    """Batches as global JAX arrays, of which this process reads its devices' sequences only."""

    def __init__(self, read: ReadShard, batch_size: int, mesh: Mesh):
        """Open the shards of the batch that this process needs.

        Args:
          read: returns one shard of each batch; see `training_batches`.
          batch_size: sequences in a batch over all processes.
        """
        self._sharding, self._batch_size = batch_sharding(mesh), batch_size
        (self._length,) = self._sharding.shard_shape((batch_size,))
        self._starts = shard_starts(self._sharding, batch_size, self._sharding.addressable_devices)
        self._sources = [
            read(shard_index=index, shard_count=count)
            for index, count in merge_shards(self._starts, self._length, batch_size)
        ]

    def __next__(self) -> Batch:
        parts = [next(source) for source in self._sources]
        if len(parts) == 1:
            batch = parts[0]
        else:
            batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        if jax.process_count() == 1:
            return jax.device_put(batch, self._sharding)
        return jax.tree.map(self._global_array, batch)

    def _global_array(self, local: np.ndarray) -> jax.Array:
        """Return a global array made of this process's sequences."""

        def shard(index: Any) -> np.ndarray:
            start = self._starts.index(index[0].start or 0) * self._length
            return local[start : start + self._length]

        shape = (self._batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, shard)

    def close(self) -> None:
        """Stop reading ahead."""
        for source in self._sources:
            if hasattr(source, "close"):
                source.close()


def shard_starts(
    sharding: NamedSharding, batch_size: int, devices: Collection[jax.Device]
) -> list[int]:
    """Return the first sequence of each batch shard that these devices hold, ascending.

    Devices along a mesh axis that does not shard the batch (tensor) hold the same sequences, also
    in several processes, each of which then reads them.
    """
    indices = sharding.devices_indices_map((batch_size,))
    return sorted({indices[device][0].start or 0 for device in devices})


def merge_shards(starts: list[int], length: int, batch_size: int) -> list[tuple[int, int]]:
    """Return as few (shard_index, shard_count) as possible that cover these shards in order.

    Args:
      starts: the first sequences of some shards, ascending.
      length: sequences in a shard; divides the batch size.
    """
    first, total = starts[0], len(starts) * length
    is_contiguous = starts == list(range(first, first + total, length))
    if is_contiguous and first % total == 0 and batch_size % total == 0:
        return [(first // total, batch_size // total)]
    return [(start // length, batch_size // length) for start in starts]


# ---- batches on the host ----


def training_batches(
    data: TokenFolder | Sources,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    packing: str = "none",
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Generator[Batch]:
    """Return endless batches of the training split from `start_step` on; close them when done.

    Threads read ahead. Every example of a source occurs once per epoch of it, in an order that
    depends on the seed and the epoch; `source_of` says which examples of a batch are of which
    source. The shards of a step, one after another, are the same batch for any number of shards.

    Args:
      batch_size: sequences in a step; each shard has B = batch_size / shard_count.
      sequence_length: T.
      seed: of the order, from 0 to 2^32 - 1.
      packing: "none": an example is T + 1 tokens of a file, wherever documents start; the rest at
        the end of a file is dropped. "documents": complete documents, each attending to itself.
      start_step: the step of the first batch; skipping costs nothing.
      shard_index: which shard of each batch to read.
      shard_count: how many shards a batch has.

    Raises:
      UserError: if the split is shorter than one example, or the batch does not divide.
    """
    shard_size = _shard_size(batch_size, shard_count)
    examples = _examples(data, seed, sequence_length, packing)
    stack = partial(_stack, is_packed=packing == "documents")
    shards = examples.batch(shard_size, batch_fn=stack)
    return _read_ahead(shards[shard_index::shard_count][start_step:])


def _examples(data: TokenFolder | Sources, seed: int, sequence_length: int, packing: str) -> Any:
    """Return the endless examples of a run, as a grain dataset."""
    import grain

    folders = data.folders if isinstance(data, Sources) else (data,)
    streams = []
    for number, folder in enumerate(folders):
        dataset = open_dataset(folder, "train", sequence_length, packing)
        shuffled = grain.MapDataset.source(dataset).seed((seed + number) % 2**32).shuffle()
        streams.append(shuffled.repeat()[:ENDLESS])
    if len(streams) == 1:
        return streams[0]
    assert isinstance(data, Sources)
    return grain.MapDataset.source(_Mixture(streams, data.weights))


class _Mixture:
    """Examples of several endless streams, each as often as its weight says."""

    def __init__(self, streams: Sequence[Any], weights: Sequence[int]) -> None:
        self._streams, self._weights = streams, weights

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Example:
        source, number = source_of(index, self._weights)
        return self._streams[source][number]


def _read_ahead(mine: Any) -> Generator[Batch]:
    """Yield the elements of a grain dataset, which threads read ahead."""
    import grain

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    iterator = iter(mine.to_iter_dataset(options))
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
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Return the batches of the validation split, in order, the same every time.

    Every token but the first of a file (packed: of a document) is a target once. Examples and
    batches are padded with zeros of weight 0, so that all batches have the same shape.

    Args:
      batch_size: sequences in a batch; each shard has B = batch_size / shard_count.
      sequence_length: T.
      packing: see `training_batches`, as for shard_index and shard_count.
      limit: the number of batches; 0, or more than there are: all.

    Raises:
      UserError: if the split has no target, or the batch does not divide.
    """
    shard_size = _shard_size(batch_size, shard_count)
    dataset = open_dataset(folder, "validation", sequence_length, packing)
    count = -(-len(dataset) // batch_size)
    starts = range(shard_index * shard_size, min(limit or count, count) * batch_size, batch_size)
    padding = make_example([], sequence_length)
    return (
        _stack(
            [dataset[i] if i < len(dataset) else padding for i in range(start, start + shard_size)],
            dataset.is_packed,
        )
        for start in starts
    )


def _stack(examples: Sequence[Example], is_packed: bool) -> Batch:
    """Return examples as a batch."""
    inputs_BT, targets_BT, weights_BT, segments_BT = (np.stack(column) for column in zip(*examples))
    return Batch(
        inputs_BT=inputs_BT,
        targets_BT=targets_BT,
        weights_BT=weights_BT,
        segments_BT=segments_BT if is_packed else None,
    )


def _shard_size(batch_size: int, shard_count: int) -> int:
    if batch_size % shard_count:
        raise UsageError(
            f"data.batch_size={batch_size} does not divide over {shard_count} processes;"
            f" use a multiple of {shard_count}"
        )
    return batch_size // shard_count
