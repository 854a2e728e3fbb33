"""The rows of a batch that each process reads: those its own devices hold, whatever the mesh.

Where an axis that does not cut the batch (tensor) spans processes, several processes hold the same
rows and each of them reads them. Does not know where rows come from.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.data.batches import Batch
from llama_jax.parallel.sharding import batch_sharding

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
