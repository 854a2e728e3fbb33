"""Whole numbers of eight bits with a scale for each group of them, as llama2.c's version 2 has it.

A tensor is its values as int8 and then a float32 scale for each run of `group` values in C order;
a run may begin in one row and end in the next. Reading and quantising again gives the same bytes
wherever a scale was made as it is here, since then the largest of each group is ±127.
"""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.weights import Tensor, mapped

LARGEST = np.float32(127)
VALUES_AT_ONCE = 2**21  # quantised at a time; their float32 copies are all the memory it takes


def quantized_bytes(count: int, group: int) -> int:
    """Bytes that `count` numbers take."""
    return count + 4 * (count // group)


def fitting_group_size(config: ModelConfig, asked: int) -> int:
    """The size asked for, halved until it divides the rows of every matrix.

    llama2.c's own exporter asks this of `dim` alone. But the rows of the matrix out of the
    feed-forward are as long as `hidden_dim`, and its C code reckons row by row: where a group
    straddles two rows it takes wrong scales and leaves out the end of the row.

    Raises:
      UserError: if `asked` is below 1.
    """
    if asked < 1:
        raise UserError(f"a group size of {asked} is out of range; expected 1 or more, such as 64")
    while config.dim % asked or config.ffn_dim % asked:
        asked //= 2
    return asked


def dequantized(path: Path, offset: int, shape: tuple[int, ...], group: int) -> Tensor:
    """A promise of the float32 numbers that values and scales at a byte offset stand for.

    Raises:
      UserError: if the file ends before they do, now or when they are read.
    """
    count = math.prod(shape)
    values = mapped(path, offset, (count // group, group), np.dtype(np.int8))
    scales = mapped(path, offset + count, (count // group, 1), np.dtype(np.float32))

    def read() -> np.ndarray:
        numbers = values.read().astype(np.float32)
        with np.errstate(all="ignore"):  # a scale may be anything, and then so are the numbers
            numbers *= scales.read()
        return numbers.reshape(shape)

    return Tensor(shape, np.dtype(np.float32), read)


def write_quantized(file: BinaryIO, array: np.ndarray, group: int, name: str) -> None:
    """Append a C-ordered array's values and scales; `group` divides its size.

    Raises:
      UserError: if a number is infinite or none.
    """
    flat = array.reshape(-1)
    scales = np.empty(flat.size // group, np.float32)
    step = max(1, VALUES_AT_ONCE // group)
    for start in range(0, scales.size, step):
        part = flat[start * group : (start + step) * group].astype(np.float32)
        values, scales[start : start + step] = quantize(part.reshape(-1, group))
        if not np.isfinite(scales[start : start + step]).all():
            raise UserError(f"{name} holds NaN or infinity, which has no 8 bits; write version 1")
        file.write(values.data)
    file.write(scales.data)


def quantize(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values, int8, and scales of float32 groups [groups, size], which are used up."""
    largest = np.abs(np.maximum(groups.max(axis=1), -groups.min(axis=1)))  # never -0.0
    scales = largest / LARGEST
    with np.errstate(invalid="ignore"):  # the caller refuses what is not finite
        groups /= np.where(scales == 0, np.float32(1), scales)[:, None]  # 0 alone makes a 0
        np.rint(groups, out=groups)
        # Only where a scale is too small for float32's usual precision is there more than 127.
        np.clip(groups, -LARGEST, LARGEST, out=groups)
        return groups.astype(np.int8), scales
