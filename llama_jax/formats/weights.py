"""A model as lazy tensors: what every format reads into and writes from.

A lazy tensor has a shape and a dtype, and reads its numbers each time it is used. So a conversion
holds one tensor at a time in memory, whatever the size of the model.
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

DTYPES = {  # that weights can be stored in
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
BLOCKS = "blocks."
CHUNK = 2**20  # numbers checked at a time


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A lazy tensor.

    `read` returns an array of this shape and dtype, anew at each call. The array may be a view of a
    mapped file: do not write to it, and drop it soon.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def astype(self, dtype: np.dtype) -> "Tensor":
        """Return the tensor cast to another dtype."""
        if dtype == self.dtype:
            return self
        return Tensor(self.shape, dtype, lambda: self.read().astype(dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A whole model: its config, its tensors by our names, and its tokenizer."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]  # the keys of `tensor_shapes(config)`, in any order
    tokenizer: bytes  # content of a tokenizer.model or .json; empty if the source has none
    bos: bool = True  # training documents began with BOS, so a prompt does
    is_rounded: bool = False  # dequantised from the int8 or int4 of our checkpoints
    chat_template: str = ""  # this and the next as in `checkpoints.metadata.Description`
    stop_ids: tuple[int, ...] = ()
    generation: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the matrices (norm scales may be wider)."""
        return self.tensors["embedding"].dtype

    def astype(self, dtype: np.dtype) -> "Weights":
        """Return the model with every tensor cast to `dtype`."""
        tensors = {name: tensor.astype(dtype) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by name, such as `blocks.3.attention.wq.kernel`.

    All layers of one kind of tensor come before the next kind, so that a format that stores a
    kind's layers as one array holds one such array at a time.
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
    """Return the name of a layer's tensor: `blocks.ffn.up.kernel`, 3 → `blocks.3.ffn.up.kernel`."""
    return f"{BLOCKS}{layer}.{stacked.removeprefix(BLOCKS)}"


def is_finite(array: np.ndarray) -> bool:
    """Return whether no number is NaN or infinite; temporaries stay small."""
    flat = array.ravel(order="K")  # a view, also of a transposed array
    return all(np.isfinite(flat[i : i + CHUNK]).all() for i in range(0, flat.size, CHUNK))


def mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    """Return a tensor stored in C order at a byte offset of a file.

    Each read maps the file anew, since a mapping counts as the process's memory while it exists.

    Raises:
      UserError: if the file ends before the tensor does, now or when it is read.
    """
    end = offset + math.prod(shape) * dtype.itemsize

    def check_size() -> None:
        if (size := path.stat().st_size) < end:
            raise UserError(f"{path} has {size:,} bytes and should have {end:,}; copy it again")

    def read() -> np.ndarray:
        check_size()
        if 0 in shape:
            return np.zeros(shape, dtype)
        # As bytes first: memmap has no bfloat16, and offsets need not be multiples of its size.
        return np.memmap(path, np.uint8, "r", offset, (end - offset,)).view(dtype).reshape(shape)

    check_size()
    return Tensor(shape, dtype, read)


def find_file(folder: Path, name: str) -> Path | None:
    """Return the file of that name in a model's folder, or None.

    A link is followed only inside the cache of huggingface_hub, where
    `models--x/snapshots/y/config.json` leads to `models--x/blobs`. Any other could make a folder
    from a stranger expose a file of this machine.

    Raises:
      UserError: if it is not a file, or a link that leaves the folder.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_file():
        raise UserError(f"{path} is not a file; copy the folder again")
    real, home = path.resolve(), folder.resolve()
    caches = [p.parents[1] for p in (home, *home.parents) if p.parent.name == "snapshots"]
    blobs = [cache / "blobs" for cache in caches if cache.name.startswith("models--")]
    if real.parent not in (home, *blobs):
        target = f"to {str(real)!r}"
        raise UserError(f"{path} is a link that leaves its folder, {target}; put the file there")
    return path
