"""The keys of a GGUF file, looked up by the type that they should have."""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from llama_jax.errors import UserError, describe_file
from llama_jax.formats.gguf.blocks import TYPES

Value = int | float | bool | str | np.ndarray | list[str]


@dataclasses.dataclass(frozen=True)
class Keys:
    """Values by their names. A look-up without a default complains if the key is missing."""

    path: Path  # of the file, for messages
    values: Mapping[str, Value]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, whole or not."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings")
        return value

    def numbers(self, key: str) -> np.ndarray:
        """An array of numbers."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray):
            raise self._wrong(key, "a list of numbers")
        return value

    def shown(self, key: str) -> str:
        """A value as a message can show it."""
        value = self.values[key]
        return "a list" if isinstance(value, list | np.ndarray) else repr(value)[:64]

    def _get(self, key: str, default: Value | None) -> Value:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no key {key}; convert the model to GGUF again")
        return value

    def _wrong(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.path} has {key} = {self.shown(key)}; expected {expected}")


# A walk through the bytes of a GGUF header, no step of which leaves the file.

LONGEST_HEADER = 2**26  # bytes; those of the largest vocabularies have some 2**24
LONGEST_NAME = 256  # bytes of a key or a tensor's name


class Cursor:
    """A place in a file, and what can be read from there on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.position = path, file, 0
        self.size = path.stat().st_size

    @property
    def left(self) -> int:
        """Bytes that the header may still have."""
        return min(self.size, LONGEST_HEADER) - self.position

    def broken(self, why: str) -> UserError:
        """The complaint about this file."""
        return UserError(f"{self.path} is a broken GGUF file: {why}; copy or convert it again")

    def require(self, count: int, what: str) -> None:
        """Complain unless `count` more bytes are there."""
        if count > self.left:
            raise self.broken(f"{what} would take {count:,} bytes where {self.left:,} are left")

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        self.require(count, what)
        data = self.file.read(count)
        if len(data) < count:
            raise self.broken("it became shorter while it was read")
        self.position += count
        return data

    def number(self, code: str, what: str) -> int | float:
        """The next number, of a `struct` code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def integer(self, code: str, what: str) -> int:
        """The next whole number."""
        return int(self.number(code, what))

    def text(self, what: str) -> str:
        """The next string."""
        data = self.take(self.integer("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not UTF-8") from error

    def name(self, what: str) -> str:
        """The next string, if it can stand in a message."""
        name = self.text(f"the name of a {what}")
        if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
            raise self.broken(f"the name of a {what} is {name[:64]!r}")
        return name


# The header of a GGUF file: its keys, and where its tensors lie. Nothing in it is believed.
#
# Every count, length and place is held against the file's size before it is used, so that a broken
# or hostile file costs no more than its own header. Does not know what keys and tensors mean.

MAGIC = b"GGUF"
LOOK = 64  # bytes by which another file is recognised
VERSIONS = (2, 3)
MOST = 2**16  # keys, or tensors; the largest Llamas have some 1,000
MOST_DIMS = 4
MOST_ALIGNMENT = 2**16
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9
LEAST_KEY, LEAST_TENSOR = 14, 33  # bytes that the shortest of them take
Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies and how."""

    path: Path
    shape: tuple[int, ...]  # as NumPy has it, the contiguous dim last
    number: int  # ggml's, of its type
    offset: int  # bytes

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, 0 if the type is not one that we read."""
        return TYPES[self.number].stored_bytes(self.shape) if self.number in TYPES else 0


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says before its numbers."""

    keys: Keys
    tensors: dict[str, Stored]


def scan(path: Path) -> Header:
    """The header of a file.

    Raises:
      UserError: if it is not GGUF of a known version, or contradicts itself or the file's size.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a GGUF file")
    with path.open("rb") as file:
        cursor = Cursor(path, file)
        tensor_count, key_count = _counts(cursor)
        keys = Keys(path, _unique(cursor, "key", key_count, _value))
        places = _unique(cursor, "tensor", tensor_count, _place)
        return Header(keys, _laid_out(cursor, keys.integer("general.alignment", 32), places))


def _counts(cursor: Cursor) -> tuple[int, int]:
    """How many tensors and keys follow."""
    begin = cursor.file.read(LOOK)
    if not begin.startswith(MAGIC):
        what = describe_file(begin) or "not a GGUF file; name one that llama.cpp can open"
        raise UserError(f"{cursor.path} is {what}")
    cursor.file.seek(len(MAGIC))
    cursor.position = len(MAGIC)
    version = cursor.integer("I", "the version")
    if version % 2**16 == 0 and version:
        raise UserError(f"{cursor.path} is big-endian GGUF; convert it to little-endian")
    if version not in VERSIONS:
        raise UserError(f"{cursor.path} is GGUF version {version}; expected 2 or 3")
    tensors, keys = cursor.integer("Q", "the counts"), cursor.integer("Q", "the counts")
    what = f"{keys:,} keys and {tensors:,} tensors"
    cursor.require(tensors * LEAST_TENSOR + keys * LEAST_KEY, what)
    if max(tensors, keys) > MOST:
        raise cursor.broken(f"{what} are too many for a model")
    return tensors, keys


def _unique(
    cursor: Cursor, what: str, count: int, read: Callable[[Cursor, str], Read]
) -> dict[str, Read]:
    """`count` things by their names, each of which `read` reads."""
    found: dict[str, Read] = {}
    for _ in range(count):
        name = cursor.name(what)
        if name in found:
            raise cursor.broken(f"it has two {what}s {name}")
        found[name] = read(cursor, name)
    return found


def _value(cursor: Cursor, key: str) -> Value:
    """The value of a key: a number, a truth, a text, an array of numbers or a list of texts."""
    kind = cursor.integer("I", key)
    if kind == STRING:
        return cursor.text(key)
    if kind == ARRAY:
        return _array(cursor, key)
    if kind not in CODES:
        raise cursor.broken(f"key {key} has type {kind}, which is unknown")
    number = cursor.number(CODES[kind], key)
    if kind == FLOAT32:
        return float(str(np.float32(number)))  # 1e-5, not 9.999999747378752e-06
    if kind == BOOL and number not in (0, 1):
        raise cursor.broken(f"key {key} is neither true nor false")
    return bool(number) if kind == BOOL else number


def _array(cursor: Cursor, key: str) -> np.ndarray | list[str]:
    kind, count = cursor.integer("I", key), cursor.integer("Q", key)
    if kind == STRING:
        return [cursor.text(key) for _ in range(count)]
    if kind not in CODES:
        raise cursor.broken(f"key {key} is an array of type {kind}; expected numbers or strings")
    dtype = np.dtype(f"<{CODES[kind]}")
    return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)


def _place(cursor: Cursor, name: str) -> Stored:
    """A tensor's place, its offset counted from where the numbers begin."""
    dims = cursor.integer("I", name)
    if not 1 <= dims <= MOST_DIMS:
        raise cursor.broken(f"tensor {name} has {dims} dims; expected 1 to {MOST_DIMS}")
    shape = tuple(cursor.integer("Q", name) for _ in range(dims))[::-1]
    number, offset = cursor.integer("I", name), cursor.integer("Q", name)
    count = TYPES[number].count if number in TYPES else 1
    if 0 in shape or shape[-1] % count:
        raise cursor.broken(f"tensor {name} has the shape {list(shape)} in blocks of {count}")
    return Stored(cursor.path, shape, number, offset)


def _laid_out(cursor: Cursor, alignment: int, places: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors with offsets from the file's start, if they lie in it one directly after another."""
    if not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.broken(f"general.alignment is {alignment}; expected a power of two to 65536")

    def aligned(position: int) -> int:
        return -(-position // alignment) * alignment

    begin, end, is_known, laid_out = aligned(cursor.position), 0, True, {}
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        # Where a tensor of a type that we cannot measure ends, any later place will do.
        if place.offset != aligned(end if is_known else place.offset):
            raise cursor.broken(f"tensor {name} has the offset {place.offset}, which cannot be")
        end, is_known = place.offset + place.nbytes, place.number in TYPES
        if begin + end > cursor.size:
            ends = f"tensor {name} would end at byte {begin + end:,}"
            raise cursor.broken(f"{ends} and the file has {cursor.size:,}")
        laid_out[name] = dataclasses.replace(place, offset=begin + place.offset)
    if places and is_known and cursor.size > begin + aligned(end):
        raise cursor.broken(f"it goes on for {cursor.size - begin - end:,} bytes after its tensors")
    return laid_out
