"""Files written by `torch.save`, read without torch: nothing in them is run, tensors are mapped.

Such a file is a zip of stored entries: a pickle, `data.pkl`, and the bytes of each storage. The
pickle is read by a subclass of Python's unpickler that has only the opcodes of plain data and knows
only the names that tensors need. Everything that the file says is checked before it is used.
"""

import dataclasses
import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from llama_jax.errors import UserError, describe_file
from llama_jax.formats.weights import Tensor, mapped

MAX_DIRECTORY = 4 * 2**20  # bytes of the zip's list of entries
MAX_ENTRIES = 10_000
MAX_PICKLE = 4 * 2**20  # bytes; that of 70 billion parameters has 0.1 MB
MAX_DIMS = 16
MAX_EMPTY = 2**40  # of an array without numbers, the product of its other dims
MAX_KEY = 2**31  # larger integers as keys could be chosen to make a dict slow
CHUNK = 2**20  # bytes read at a time for a checksum
LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name
NAMES = re.compile(  # all that torch.save writes
    r"([^/\\\0]+)/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]{1,9})"
)
STORAGES = {  # torch.FloatStorage and so on
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
    """Return the tensors of a file that holds nothing else, such as a state_dict.

    A storage is compared with its checksum when it is first read. A tensor may be any view of its
    storage; one that is not in C order is copied when read.

    Raises:
      UserError: if the file is damaged, is something else, or holds anything but tensors by name.
    """
    tensors = read_object(path)
    if type(tensors) is not dict:
        raise UserError(f"{path} holds a {type(tensors).__name__}; expected tensors by name")
    for name, tensor in tensors.items():
        if type(name) is not str or not isinstance(tensor, Tensor):
            what = f"{str(name)[:80]!a}, a {type(tensor).__name__}"
            raise UserError(f"{path} holds {what}; expected tensors by name and nothing else")
    return tensors


def read_object(path: Path) -> Any:
    """Return the object in a file: tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
      UserError: if the file is damaged, is something else, or names anything else.
    """
    entries = _entries(path)
    pickled = entries.get("data.pkl")
    if pickled is None:
        raise UserError(f"{path} has no data.pkl; expected a file that torch.save wrote")
    if pickled.size > MAX_PICKLE:
        raise UserError(f"{path}: data.pkl has {pickled.size:,} bytes, too many; not read")
    order = entries.get("byteorder")  # absent in old files, which are little-endian
    if order is not None and (order.size != 6 or order.read() != b"little"):
        raise UserError(f"{path} is not little-endian; save it again on an ordinary machine")
    unpickler = _Unpickler(path, entries, pickled.read())
    try:
        return unpickler.load()
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the unpickler do
        where = f"before byte {unpickler.file.tell():,} of data.pkl"
        message = f"{path} is damaged or not a file of tensors: {type(error).__name__} {where}"
        raise UserError(message) from error


# ---- the zip ----


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The bytes [offset, offset + size) of a file."""

    path: Path
    name: str
    offset: int
    size: int
    crc: int  # 0: the writer computed none

    def read(self) -> bytes:
        """Return the bytes of a small entry."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        self._check(len(data), zlib.crc32(data))
        return data

    def verify(self) -> None:
        """Raise `UserError` if the bytes do not have their checksum."""
        if not self.crc:
            return
        size, crc = 0, 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while data := file.read(min(CHUNK, self.size - size)):
                size, crc = size + len(data), zlib.crc32(data, crc)
        self._check(size, crc)

    def _check(self, size: int, crc: int) -> None:
        if size != self.size or self.crc not in (0, crc):
            raise UserError(f"{self.path} is damaged in {self.name}; copy it again")


class _BoundedFile(io.FileIO):
    """A file that refuses large reads, with which `zipfile` would list absurdly many entries."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a list of entries of {size:,} bytes")
        return super().read(size)


def _entries(path: Path) -> dict[str, _Entry]:
    """Return the entries by their names inside the one folder: `data.pkl`, `data/0`, …"""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a .pth that torch.save wrote")
    try:
        with _BoundedFile(path) as file:
            start = file.read(512)
            if not start.startswith(b"PK\3\4"):
                raise UserError(f"{path} is {_description(start)}")
            with zipfile.ZipFile(file) as archive:
                return _checked(path, archive, file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # damage makes `zipfile` raise more than `BadZipFile`
        message = f"{path} is a damaged zip, or cut short: {str(error)[:80]!r}; copy it again"
        raise UserError(message) from error


def _checked(path: Path, archive: zipfile.ZipFile, file: io.FileIO) -> dict[str, _Entry]:
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:
        raise UserError(f"{path} has {len(infos):,} entries; expected at most {MAX_ENTRIES:,}")
    found: dict[str, _Entry] = {}
    folders = set()
    for info in infos:
        match = NAMES.fullmatch(info.orig_filename)
        if match is None or match[1] in (".", ".."):
            strange = f"{info.orig_filename[:80]!a}, which torch.save never writes"
            raise UserError(f"{path} holds {strange}; not read")
        folder, name = match.groups()
        if info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise UserError(f"{path} has {name} compressed; torch.save only stores; not read")
        if name in found:
            raise UserError(f"{path} holds {name} twice; torch.save writes it once")
        beyond = f"{path}: {name} should be {info.file_size:,} bytes, more than it has"
        if info.header_offset < archive.start_dir < info.header_offset + info.file_size:
            raise UserError(beyond)  # before newer versions of `zipfile` call it an overlap
        archive.open(info).close()  # compares the entry's own header
        file.seek(info.header_offset)
        lengths = struct.unpack_from("<2H", file.read(LOCAL_HEADER), LOCAL_HEADER - 4)
        offset = info.header_offset + LOCAL_HEADER + sum(lengths)
        if offset + info.file_size > archive.start_dir:
            raise UserError(beyond)
        found[name] = _Entry(path, name, offset, info.file_size, info.CRC)
        folders.add(folder)
    if len(folders) != 1:
        raise UserError(f"{path} is a zip of {len(folders)} folders; expected one of torch.save's")
    return found


def _description(start: bytes) -> str:
    """Return what a file is that is no zip, by its first bytes."""
    if what := describe_file(start):
        return what
    if start[0] == 0x80 or start[257:262] == b"ustar":  # a pickle or a tar
        return (
            "not a zip, as torch.save has written since 1.6; if you trust it, load it with a newer"
            " torch and torch.save it again"
        )
    return "not a file that torch.save wrote; expected a zip"


# ---- the pickle ----

OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID),
    *(pickle.MARK, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINUNICODE, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
)


PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(PythonUnpickler):
    """Builds the object in a pickle of protocol 2, out of data and tensors alone.

    The unpickler in Python, not that in C, since its opcodes can be chosen, and since its memo is a
    dict, while that in C allocates memory for the largest place that a pickle names.
    """

    dispatch: ClassVar[dict[int, Callable]] = {
        code[0]: PythonUnpickler.dispatch[code[0]] for code in OPCODES
    }

    def __init__(self, path: Path, entries: dict[str, _Entry], data: bytes) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file)
        self.path, self.entries = path, entries
        self.storages: dict[str, _Storage] = {}
        self.names: dict[str, Any] = {
            f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()
        }
        self.names["collections.OrderedDict"] = self._empty_dict
        self.names["torch._utils._rebuild_tensor_v2"] = self._tensor
        self.names["torch._utils._rebuild_parameter"] = self._parameter

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.names:
            raise UserError(
                f"{self.path} names {ascii(full[:200])[1:-1]}, which no file of tensors needs and"
                " which could be harmful; nothing of it was run"
            )
        return self.names[full]

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples as keys could be nested so that their hash takes forever.
            if type(key) is not str and not (type(key) is int and 0 <= key < MAX_KEY):
                raise ValueError("a key is neither a string nor a small integer")
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_build(self) -> None:
        """Drop the attributes of an OrderedDict, such as a state_dict's `_metadata`."""
        self.stack.pop()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, key: Any) -> "_Storage":
        """Return a storage: ("storage", dtype, entry, device, count)."""
        kind, dtype, name, _, count = key
        is_valid = kind == "storage" and isinstance(dtype, np.dtype)
        if not is_valid or type(name) is not str or type(count) is not int:
            raise UserError(f"{self.path} describes a storage wrongly; copy the file again")
        entry = self.entries.get(f"data/{name}")
        if entry is None or entry.size != count * dtype.itemsize:
            held = "missing" if entry is None else f"{entry.size:,} bytes"
            wanted = f"{count:,} × {dtype.itemsize}" if 0 <= count < 2**63 else "an absurd number"
            expected = f"expected {wanted} bytes"
            raise UserError(f"{self.path}: storage {name[:80]!a} is {held}; {expected}")
        storage = self.storages.setdefault(name, _Storage(entry, dtype))
        if storage.dtype != dtype:
            both = f"{storage.dtype} as well as {dtype}"
            raise UserError(f"{self.path}: storage {name[:80]!a} is {both}")
        return storage

    def _empty_dict(self, *arguments: Any) -> dict:
        if arguments:
            raise UserError(f"{self.path} makes an OrderedDict of something; use torch.save")
        return {}

    def _parameter(self, tensor: Any = None, *_: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise UserError(f"{self.path} describes a parameter wrongly; copy the file again")
        return tensor

    def _tensor(self, *arguments: Any) -> Tensor:
        """Return a view: (storage, offset, shape, strides, two or three facts for training)."""
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
            raise UserError(f"{self.path} describes a tensor wrongly; copy the file again")
        storage, offset, shape, strides = arguments[:4]
        are_tuples = type(shape) is tuple and type(strides) is tuple
        if not are_tuples or not len(shape) == len(strides) <= MAX_DIMS:
            raise UserError(f"{self.path} describes a tensor's shape wrongly; copy the file again")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
            raise UserError(f"{self.path} has a tensor with an absurd size, stride or offset")
        if 0 in shape:
            if math.prod(size or 1 for size in shape) > MAX_EMPTY:
                raise UserError(f"{self.path} has a tensor of absurd shape {list(shape)}")
            return Tensor(shape, storage.dtype, lambda: np.zeros(shape, storage.dtype))
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
        if last >= storage.count or math.prod(shape) > storage.count:
            raise UserError(
                f"{self.path} has a tensor {list(shape)} with strides {list(strides)} at {offset},"
                f" beyond its storage of {storage.count:,} numbers; not read"
            )
        return storage.view(offset, shape, strides, last - offset + 1)


# ---- tensors ----


class _Storage:
    """Numbers in a file, compared with their checksum once."""

    def __init__(self, entry: _Entry, dtype: np.dtype) -> None:
        self.entry, self.dtype = entry, dtype
        self.count = entry.size // dtype.itemsize
        self.verified = False

    def view(
        self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], span: int
    ) -> Tensor:
        """Return the tensor with these strides, in numbers; all its numbers are among `span`."""
        start = self.entry.offset + offset * self.dtype.itemsize
        read: Callable[[], np.ndarray]
        if strides == c_strides(shape):
            read = mapped(self.entry.path, start, shape, self.dtype).read
        else:
            numbers = mapped(self.entry.path, start, (span,), self.dtype)
            steps = [
                0 if n == 1 else stride * self.dtype.itemsize for n, stride in zip(shape, strides)
            ]

            def read() -> np.ndarray:
                as_strided = np.lib.stride_tricks.as_strided
                return as_strided(numbers.read(), shape, steps, writeable=False).copy()

        def read_verified() -> np.ndarray:
            if not self.verified:
                self.entry.verify()
                self.verified = True
            return read()

        return Tensor(shape, self.dtype, read_verified)


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of C order, in numbers."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
