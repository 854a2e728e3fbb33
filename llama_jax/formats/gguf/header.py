"""The header of a GGUF file: its metadata keys, and where its tensors are.

Nothing in a header is trusted: every count, length and offset is compared with the size of the file
before it is used, so that a broken or hostile file costs no more than its own header. Versions 2
and 3, little-endian; the layout is described in ggml's `docs/gguf.md`.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import gguf
import numpy as np

from llama_jax.errors import UserError, describe_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 2**26  # bytes; the largest vocabularies need about 2**24
MAX_NAME = 256  # bytes of a key or a tensor's name
MAX_COUNT = 2**16  # keys, or tensors; the largest Llamas have about 1,000
MAX_DIMS = 4
MAX_ALIGNMENT = 2**16
MIN_KEY, MIN_TENSOR = 14, 33  # bytes of the shortest of each
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9
TYPES = {  # of values, in messages
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list of strings",
    np.ndarray: "a list of numbers",
}

Value = int | float | bool | str | np.ndarray | list[str]
T = TypeVar("T", int, float, bool, str, list[str], np.ndarray)
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The metadata of a file: values by key."""

    path: Path  # of the file, for messages
    values: Mapping[str, Value]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a value; an integer is accepted for a float.

        Raises:
          UserError: if it has another type, or if it is missing and there is no default.
        """
        value: Any = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no key {key}; convert the model to GGUF again")
        accepted = (int, float) if kind is float else kind
        is_right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
        if not is_right:
            raise UserError(f"{self.path} has {key} = {self.shown(key)}; expected {TYPES[kind]}")
        return value

    def shown(self, key: str) -> str:
        """Return a value as it appears in a message."""
        value = self.values[key]
        return "a list" if isinstance(value, list | np.ndarray) else repr(value)[:64]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a file, and its type."""

    path: Path
    shape: tuple[int, ...]  # in NumPy's order, the contiguous dim last
    type_number: int  # ggml's
    offset: int  # bytes

    @property
    def block(self) -> tuple[int, int] | None:
        """The numbers and bytes of a block, or None if the type is unknown."""
        try:
            return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.type_number)]
        except (ValueError, KeyError):
            return None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes; 0 if the type is unknown."""
        count, size = self.block or (1, 0)
        return math.prod(self.shape) // count * size


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file contains before its tensors' data."""

    keys: Keys
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Return the header of a file.

    Raises:
      UserError: if it is not GGUF of a known version, or contradicts itself or the file's size.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a GGUF file")
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        tensor_count, key_count = _read_counts(cursor)
        keys = Keys(path, _read_named(cursor, "key", key_count, _read_value))
        tensors = _read_named(cursor, "tensor", tensor_count, _read_tensor)
        return Header(keys, _located(cursor, keys.get("general.alignment", int, 32), tensors))


class _Cursor:
    """A position in a file, from which values are read; never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.position = path, file, 0
        self.size = path.stat().st_size

    def broken(self, why: str) -> UserError:
        return UserError(f"{self.path} is a broken GGUF file: {why}; copy or convert it again")

    def require(self, count: int, what: str) -> None:
        left = min(self.size, MAX_HEADER) - self.position
        if count > left:
            raise self.broken(f"{what} would take {count:,} bytes where {left:,} are left")

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        data = self.file.read(count)
        if len(data) < count:
            raise self.broken("it became shorter while it was read")
        self.position += count
        return data

    def number(self, code: str, what: str) -> Any:
        """Read a number of a `struct` code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not UTF-8") from error

    def name(self, what: str) -> str:
        """Read a string that can be part of a message."""
        name = self.text(f"the name of a {what}")
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise self.broken(f"the name of a {what} is {name[:64]!r}")
        return name


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Read everything up to the numbers of tensors and keys, and return these."""
    start = cursor.file.read(64)
    if not start.startswith(MAGIC):
        what = describe_file(start) or "not a GGUF file; name one that llama.cpp can open"
        raise UserError(f"{cursor.path} is {what}")
    cursor.file.seek(len(MAGIC))
    cursor.position = len(MAGIC)
    version = cursor.number("I", "the version")
    if version % 2**16 == 0 and version:
        raise UserError(f"{cursor.path} is big-endian GGUF; convert it to little-endian")
    if version not in VERSIONS:
        raise UserError(f"{cursor.path} is GGUF version {version}; expected 2 or 3")
    tensors, keys = cursor.number("Q", "the counts"), cursor.number("Q", "the counts")
    what = f"{keys:,} keys and {tensors:,} tensors"
    cursor.require(tensors * MIN_TENSOR + keys * MIN_KEY, what)
    if max(tensors, keys) > MAX_COUNT:
        raise cursor.broken(f"{what} are too many for a model")
    return tensors, keys


def _read_named(
    cursor: _Cursor, what: str, count: int, read: Callable[[_Cursor, str], Item]
) -> dict[str, Item]:
    """Read `count` items, each after its name; names must differ."""
    found: dict[str, Item] = {}
    for _ in range(count):
        name = cursor.name(what)
        if name in found:
            raise cursor.broken(f"it has two {what}s {name}")
        found[name] = read(cursor, name)
    return found


def _read_value(cursor: _Cursor, key: str) -> Value:
    kind = cursor.number("I", key)
    if kind == STRING:
        return cursor.text(key)
    if kind == ARRAY:
        return _read_array(cursor, key)
    if kind not in CODES:
        raise cursor.broken(f"key {key} has type {kind}, which is unknown")
    number = cursor.number(CODES[kind], key)
    if kind == FLOAT32:
        return float(str(np.float32(number)))  # 1e-5, not 9.999999747378752e-06
    if kind == BOOL and number not in (0, 1):
        raise cursor.broken(f"key {key} is neither true nor false")
    return bool(number) if kind == BOOL else number


def _read_array(cursor: _Cursor, key: str) -> np.ndarray | list[str]:
    kind, count = cursor.number("I", key), cursor.number("Q", key)
    if kind == STRING:
        return [cursor.text(key) for _ in range(count)]
    if kind not in CODES:
        raise cursor.broken(f"key {key} is an array of type {kind}; expected numbers or strings")
    dtype = np.dtype(f"<{CODES[kind]}")
    return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)


def _read_tensor(cursor: _Cursor, name: str) -> StoredTensor:
    """Read a tensor's description; its offset still counts from the start of the data."""
    dims = cursor.number("I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.broken(f"tensor {name} has {dims} dims; expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.number("Q", name) for _ in range(dims))[::-1]
    number, offset = cursor.number("I", name), cursor.number("Q", name)
    tensor = StoredTensor(cursor.path, shape, number, offset)
    count = (tensor.block or (1, 0))[0]
    if 0 in shape or shape[-1] % count:
        raise cursor.broken(f"tensor {name} has the shape {list(shape)} in blocks of {count}")
    return tensor


def _located(
    cursor: _Cursor, alignment: int, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors with offsets from the start of the file.

    Raises:
      UserError: unless each follows directly after the one before it and all are in the file.
    """
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.broken(f"general.alignment is {alignment}; expected a power of two to 65536")

    def aligned(position: int) -> int:
        return -(-position // alignment) * alignment

    start, end, is_known, located = aligned(cursor.position), 0, True, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        # After a tensor of an unknown type, whose size is unknown, any later offset is accepted.
        if tensor.offset != aligned(end if is_known else tensor.offset):
            raise cursor.broken(f"tensor {name} has the offset {tensor.offset}, which cannot be")
        end, is_known = tensor.offset + tensor.nbytes, tensor.block is not None
        if start + end > cursor.size:
            ends = f"tensor {name} would end at byte {start + end:,}"
            raise cursor.broken(f"{ends} and the file has {cursor.size:,}")
        located[name] = dataclasses.replace(tensor, offset=start + tensor.offset)
    if tensors and is_known and cursor.size > start + aligned(end):
        raise cursor.broken(f"it goes on for {cursor.size - start - end:,} bytes after its tensors")
    return located
