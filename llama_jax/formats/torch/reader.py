"""Files that torch.save wrote, read without torch: tensors by name, nothing run, nothing copied.

Does not know what the tensors are for. The zip is `torch_zip`'s, the pickle in it
`torch_pickle`'s, and `torch_writer` writes such files.
"""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.torch.pickle import Function, unpickle
from llama_jax.formats.torch.zip import Entry, entries
from llama_jax.formats.weights import Tensor, mapped

LARGEST_PICKLE = 64 * 2**20  # bytes; that of 70 billion parameters has 0.1 MB
MOST_DIMS = 16
LARGEST_EMPTY = 2**40  # of an array without numbers, the product of its other dims
STORAGES = {  # what a file calls a run of numbers: torch.FloatStorage and so on
    "Float": np.dtype(np.float32),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Double": np.dtype(np.float64),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing else, such as a state_dict.

    Raises:
      UserError: as `load`, or if there is anything but tensors by name.
    """
    tensors = load(path)
    if type(tensors) is not dict:
        raise UserError(f"{path} holds a {type(tensors).__name__}; expected tensors by name")
    for name, tensor in tensors.items():
        if type(name) is not str or not isinstance(tensor, Tensor):
            what = f"{str(name)[:80]!a}, a {type(tensor).__name__}"
            raise UserError(f"{path} holds {what}; expected tensors by name and nothing else")
    return tensors


def load(path: Path) -> Any:
    """What a file holds: dicts, lists, tuples, texts, numbers, and a `Tensor` for each tensor.

    A tensor's bytes are compared with the checksum beside them when it is first read. It may be
    any view of its storage; one that is not in C order is copied when read. Structures may
    contain themselves.

    Raises:
      UserError: one line if the file is damaged, is something else, or names any object but
        tensors; nothing that it names is ever run.
    """
    parts = entries(path)
    pickled = parts.get("data.pkl")
    if pickled is None:
        raise UserError(f"{path} has no data.pkl; expected a file that torch.save wrote")
    if pickled.size > LARGEST_PICKLE:
        raise UserError(f"{path}: data.pkl has {pickled.size:,} bytes, beyond belief; not read")
    _require_little_endian(path, parts.get("byteorder"))
    storages: dict[str, _Storage] = {}
    names: dict[str, Any] = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}
    names["collections.OrderedDict"] = Function(lambda *args: _empty_dict(path, args))
    names["torch._utils._rebuild_tensor_v2"] = Function(lambda *args: _tensor(path, args))
    names["torch._utils._rebuild_parameter"] = Function(lambda *args: _parameter(path, args))
    return unpickle(pickled.read(), names, lambda key: _storage(path, parts, storages, key), path)


def _require_little_endian(path: Path, order: Entry | None) -> None:
    """Old files do not say in which order their bytes are, and are little-endian."""
    if order is not None and (order.size != 6 or order.read() != b"little"):
        raise UserError(f"{path} is not little-endian; save it again on an ordinary machine")


class _Storage:
    """A run of numbers in a file, checked against its checksum once."""

    def __init__(self, entry: Entry, dtype: np.dtype) -> None:
        self.entry, self.dtype = entry, dtype
        self.count = entry.size // dtype.itemsize
        self.verified = False

    def read(self, view: Tensor) -> np.ndarray:
        """The array of a view of the storage."""
        if not self.verified:
            self.entry.verify()
            self.verified = True
        return view.read()


def _storage(
    path: Path, parts: dict[str, Entry], storages: dict[str, _Storage], key: Any
) -> _Storage:
    """The storage that a persistent id means: ("storage", dtype, entry, device, count)."""
    if type(key) is not tuple or len(key) != 5 or key[0] != "storage":
        raise UserError(f"{path} refers to something else than a storage; expected plain tensors")
    _, dtype, name, _, count = key
    if not isinstance(dtype, np.dtype) or type(name) is not str or type(count) is not int:
        raise UserError(f"{path} describes a storage wrongly; copy the file again")
    entry = parts.get(f"data/{name}")
    if entry is None or entry.size != count * dtype.itemsize:
        held = "missing" if entry is None else f"{entry.size:,} bytes"
        wanted = f"{count:,} × {dtype.itemsize} bytes" if 0 <= count < 2**63 else "an absurd size"
        raise UserError(f"{path}: storage {name[:80]!a} is {held}; expected {wanted}")
    storage = storages.setdefault(name, _Storage(entry, dtype))
    if storage.dtype != dtype:
        raise UserError(f"{path}: storage {name[:80]!a} is {storage.dtype} as well as {dtype}")
    return storage


def _empty_dict(path: Path, arguments: tuple) -> dict:
    if arguments:
        raise UserError(f"{path} makes an OrderedDict in an unknown way; save it with torch.save")
    return {}


def _parameter(path: Path, arguments: tuple) -> Tensor:
    """A parameter is a tensor with two more facts, which matter only in training."""
    if len(arguments) != 3 or not isinstance(arguments[0], Tensor):
        raise UserError(f"{path} describes a parameter wrongly; copy the file again")
    return arguments[0]


def _tensor(path: Path, arguments: tuple) -> Tensor:
    """A view of a storage: (storage, offset, shape, strides, two or three facts for training)."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
        raise UserError(f"{path} describes a tensor wrongly; copy the file again")
    storage, offset, shape, strides = arguments[:4]
    tuples = type(shape) is tuple and type(strides) is tuple
    if not tuples or not len(shape) == len(strides) <= MOST_DIMS:
        raise UserError(f"{path} describes a tensor's shape wrongly; copy the file again")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        raise UserError(f"{path} has a tensor with a size, stride or offset that is none")
    if 0 in shape:
        if math.prod(size or 1 for size in shape) > LARGEST_EMPTY:
            raise UserError(f"{path} has a tensor of absurd shape {list(shape)}")
        return Tensor(shape, storage.dtype, lambda: np.zeros(shape, storage.dtype))
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if last >= storage.count or math.prod(shape) > storage.count:
        raise UserError(
            f"{path} has a tensor {list(shape)} with strides {list(strides)} at {offset}, beyond"
            f" its storage of {storage.count:,} numbers; not read"
        )
    start = storage.entry.offset + offset * storage.dtype.itemsize
    if strides == c_strides(shape):
        view = mapped(path, start, shape, storage.dtype)
    else:
        view = _strided(mapped(path, start, (last - offset + 1,), storage.dtype), shape, strides)
    return Tensor(shape, storage.dtype, lambda: storage.read(view))


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of C order, counted in numbers."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _strided(span: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The numbers of `span` in another order, copied into C order when read."""
    steps = [
        0 if size == 1 else stride * span.dtype.itemsize for size, stride in zip(shape, strides)
    ]

    def read() -> np.ndarray:
        return np.lib.stride_tricks.as_strided(span.read(), shape, steps, writeable=False).copy()

    return Tensor(shape, span.dtype, read)
