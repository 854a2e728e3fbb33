"""A walk through the bytes of a GGUF header, no step of which leaves the file."""

import struct
from pathlib import Path
from typing import BinaryIO

from llama_jax.errors import UserError

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
