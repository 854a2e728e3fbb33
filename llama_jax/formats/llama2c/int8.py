"""The int8 of llama2.c's version 2: groups of numbers that share a scale.

A tensor is its values as int8, then a float32 scale for each `group` of them in C order; a group
may begin in one row and end in the next. A tensor that was quantised here, or by the same rule, is
quantised to the same bytes again after reading, since the largest of each group is ±127.
"""

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.weights import Tensor, mapped

LARGEST = np.float32(127)
CHUNK = 2**21  # numbers quantised at a time, to bound the memory of their float32 copies


def quantized_bytes(count: int, group: int) -> int:
    """Return the bytes that `count` numbers take."""
    return count + 4 * (count // group)


def fitting_group_size(config: ModelConfig, group_size: int) -> int:
    """Return a group size, halved until it divides the rows of every matrix.

    llama2.c's exporter checks `dim` alone. But the rows of `ffn.down` have `hidden_dim` numbers,
    and its C code computes row by row: where a group spans two rows it uses wrong scales and
    leaves out the end of the row.

    Raises:
      UserError: if the group size is below 1.
    """
    if group_size < 1:
        raise UserError(f"group_size={group_size} is out of range; expected 1 or more, such as 64")
    while config.dim % group_size or config.ffn_dim % group_size:
        group_size //= 2
    return group_size


def dequantized(path: Path, offset: int, shape: tuple[int, ...], group: int) -> Tensor:
    """Return the tensor whose values and scales are at a byte offset, as float32.

    Raises:
      UserError: if the file ends before they do, now or when they are read.
    """
    count = math.prod(shape)
    values = mapped(path, offset, (count // group, group), np.dtype(np.int8))
    scales = mapped(path, offset + count, (count // group, 1), np.dtype(np.float32))

    def read() -> np.ndarray:
        numbers = values.read().astype(np.float32)
        with np.errstate(all="ignore"):  # scales may be NaN or infinite, and then so are numbers
            numbers *= scales.read()
        return numbers.reshape(shape)

    return Tensor(shape, np.dtype(np.float32), read)


def write_quantized(file: BinaryIO, array: np.ndarray, group: int, name: str) -> None:
    """Append a C-ordered array's values and scales; `group` divides its size.

    Raises:
      UserError: if a number is NaN or infinite.
    """
    flat = array.reshape(-1)
    scales = np.empty(flat.size // group, np.float32)
    step = max(1, CHUNK // group)
    for start in range(0, scales.size, step):
        part = flat[start * group : (start + step) * group].astype(np.float32)
        values, scales[start : start + step] = quantize(part.reshape(-1, group))
        if not np.isfinite(scales[start : start + step]).all():
            raise UserError(f"{name} holds NaN or infinity, which int8 cannot; write version 1")
        file.write(values.data)
    file.write(scales.data)


def quantize(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values and scales of float32 groups [groups, size], which are overwritten."""
    largest = np.abs(np.maximum(groups.max(axis=1), -groups.min(axis=1)))  # never -0.0
    scales = largest / LARGEST
    with np.errstate(invalid="ignore"):  # the caller refuses what is not finite
        groups /= np.where(scales == 0, np.float32(1), scales)[:, None]
        np.rint(groups, out=groups)
        # More than 127 is possible only where a scale is subnormal, hence imprecise.
        np.clip(groups, -LARGEST, LARGEST, out=groups)
        return groups.astype(np.int8), scales
