"""Arrays in the middle of files, mapped when read and unmapped when dropped.

A mapping counts as the process's memory only while it lives, so that reading a model tensor by
tensor never holds more than one.
"""

import math
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.weights import Tensor


def mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """A promise of `shape` numbers that lie in C order at a byte offset of a file.

    Raises:
      UserError: if the file ends before they do, now or when they are read.
    """
    end = offset + math.prod(shape) * dtype.itemsize
    require_bytes(path, end)

    def read() -> np.ndarray:
        require_bytes(path, end)
        if 0 in shape:
            return np.zeros(shape, dtype)
        # As bytes first: memmap knows no bfloat16, and offsets need not be multiples of its size.
        count = end - offset
        return np.memmap(path, np.uint8, "r", offset, (count,)).view(dtype).reshape(shape)

    return Tensor(shape, dtype, read)


def require_bytes(path: Path, count: int) -> None:
    """`UserError` if a file is shorter than `count` bytes."""
    size = path.stat().st_size
    if size < count:
        raise UserError(f"{path} has {size:,} bytes and should have {count:,}; copy it again")
