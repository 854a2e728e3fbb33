"""A model that is described but not in memory: what every format reads into and writes from.

A tensor is a promise: its shape and dtype are known, its numbers are read when asked for and
belong to the asker alone. So a conversion holds one tensor at a time, whatever the model's size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.model.parameters import abstract, named_leaves

DTYPES = {  # what weights may be stored as
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
BLOCKS = "blocks."


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A promise of an array.

    `read` returns an array of exactly this shape and dtype. It reads anew at each call and may
    return a view of a mapped file: do not write to it, drop it soon.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def astype(self, dtype: np.dtype) -> "Tensor":
        """The same numbers rounded to another dtype."""
        if dtype == self.dtype:
            return self
        return Tensor(self.shape, dtype, lambda: self.read().astype(dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole model: its shape, its tensors by our names, and its tokenizer."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]  # the keys of `tensor_shapes(config)`, in any order
    tokenizer: bytes  # a SentencePiece model; empty where a source carries none
    bos: bool = True  # documents it learnt from begin with BOS
    is_rounded: bool = False  # the numbers are those of small integers, stored by us
    chat_template: str = ""  # see `checkpoints.metadata.Description`

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the matrices (norm scales may be wider)."""
        return self.tensors["embedding"].dtype

    def astype(self, dtype: np.dtype) -> "Weights":
        """The same model with every tensor rounded to `dtype`."""
        tensors = {name: tensor.astype(dtype) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by name, kind by kind and layer by layer within a kind.

    A layer's tensors are named `blocks.{layer}.attention.wq.kernel` and so on. Kinds come first so
    that whoever stores a kind's layers as one array holds one such array at a time.
    """
    return dict(_tensor_shapes(config))


@functools.lru_cache(maxsize=64)
def _tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, leaf in named_leaves(abstract(config)).items():
        if name.startswith(BLOCKS):
            for layer in range(config.num_layers):
                shapes[of_layer(name, layer)] = leaf.shape[1:]
        else:
            shapes[name] = leaf.shape
    return shapes


def of_layer(stacked: str, layer: int) -> str:
    """The name of one layer's part of a stacked array: `blocks.ffn.up.kernel`, 3 → `blocks.3.…`."""
    return f"{BLOCKS}{layer}.{stacked.removeprefix(BLOCKS)}"


def is_finite(array: np.ndarray) -> bool:
    """Return whether no number is NaN or infinite; temporaries stay small."""
    flat = array.ravel(order="K")  # a view, also of a transposed array
    chunk = 2**20
    return all(np.isfinite(flat[i : i + chunk]).all() for i in range(0, flat.size, chunk))


# Arrays in the middle of files, mapped when read and unmapped when dropped.
#
# A mapping counts as the process's memory only while it lives, so that reading a model tensor by
# tensor never holds more than one.


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
