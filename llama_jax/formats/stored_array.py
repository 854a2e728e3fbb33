"""One array of a checkpoint, promised layer by layer and checked against its checksum.

Knows how much of it has to be read at a time, not what it is for.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.checksums import partial_checksum
from llama_jax.checkpoints.layout import damaged


class LastStack:
    """The one array that was read whole for the sake of its layers and may be asked for more."""

    def __init__(self) -> None:
        self.name, self.array = "", np.zeros(0)

    def forget(self) -> None:
        """Let the memory go."""
        self.__init__()  # type: ignore[misc]


class StoredArray:
    """An array of a step; reading raises `UserError` when its bits are not what was written."""

    def __init__(self, step: Path, name: str, array: Any, checksum: int, last: LastStack) -> None:
        self.step, self.name, self._array, self._checksum = step, name, array, checksum
        self._last = last
        self._sums: dict[int, int] = {}  # of the layers read so far
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(array.dtype.numpy_dtype)

    def read(self) -> np.ndarray:
        """All of it."""
        whole = self._read(...)
        self._verify(partial_checksum(whole))
        return whole

    def read_layer(self, layer: int) -> np.ndarray:
        """One layer; of an array that is not stored in layers all is read and kept until the next.

        Weights are used kind by kind, so the others are asked for soon.
        """
        if self._array.chunk_layout.read_chunk.shape[0] > 1:
            if self._last.name != self.name:
                self._last.forget()  # before the next is read: never two at once
                self._last.array, self._last.name = self.read(), self.name
            return self._last.array[layer]
        part = self._read(layer)
        self._sums[layer] = partial_checksum(part, layer * part.size)
        if len(self._sums) == self.shape[0]:
            self._verify(sum(self._sums.values()) % 2**32)
        return part

    def _read(self, index: Any) -> np.ndarray:
        try:
            return self._array[index].read().result()
        except (OSError, ValueError) as error:
            raise damaged(self.step, error) from error

    def _verify(self, found: int) -> None:
        if found != self._checksum:
            why = f"checksum of {self.name} differs; name an older step if there is one"
            raise damaged(self.step, why)
