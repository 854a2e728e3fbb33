"""Where the entries of a torch file lie: a zip whose parts are only stored and never unpacked.

Does not know what the entries mean. Nothing in the file is trusted: every count, size and offset
is held against the file's size before it is used.
"""

import dataclasses
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llama_jax.errors import UserError, describe_file

MOST_ENTRIES = 10_000
LARGEST_DIRECTORY = 16 * 2**20  # bytes that list the entries
CHUNK = 2**20  # bytes read at once
NAME = re.compile(  # all that torch.save writes
    r"([^/\\\0]+)/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]{1,9})"
)

END = struct.Struct("<4s4H2IH")  # signature, 2 disks, 2 counts, size, offset, length of comment
LOCATOR = struct.Struct("<4sIQI")  # signature, disk, offset of END64, disks
END64 = struct.Struct("<4sQ2H2I4Q")  # signature, size, versions, disks, 2 counts, size, offset
CENTRAL = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A part of a file: the bytes [offset, offset + size)."""

    path: Path
    name: str
    offset: int
    size: int
    crc: int  # 0: the writer computed none

    def read(self) -> bytes:
        """Its bytes; `UserError` if they are not those that were written."""
        data = b"".join(self._chunks())
        self._require(zlib.crc32(data))
        return data

    def verify(self) -> None:
        """`UserError` if its bytes are not those that were written."""
        if self.crc:
            crc = 0
            for chunk in self._chunks():
                crc = zlib.crc32(chunk, crc)
            self._require(crc)

    def _chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.size, CHUNK):
                yield file.read(min(CHUNK, self.size - start))

    def _require(self, crc: int) -> None:
        if self.crc not in (0, crc):
            raise UserError(f"{self.path} is damaged in {self.name}; copy it again")


def entries(path: Path) -> dict[str, Entry]:
    """The entries of a torch file by their names inside its one folder: `data.pkl`, `data/0`, …

    Raises:
      UserError: if this is not such a file, with what it is instead where that can be told.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a .pth that torch.save wrote")
    try:
        with path.open("rb") as file:
            _recognise(path, file.read(512))
            return _entries(path, file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _recognise(path: Path, head: bytes) -> None:
    """Refuse what is often found where a torch file should be."""
    if head.startswith(b"PK\3\4"):
        return
    if why := describe_file(head):
        raise UserError(f"{path} is {why}")
    if head[0] == 0x80 or head[257:262] == b"ustar":
        raise UserError(
            f"{path} is not a zip, as torch.save has written since 1.6; if you trust it, load it"
            " with a newer torch and torch.save it again"
        )
    raise UserError(f"{path} is not a file that torch.save wrote; expected a zip")


def _entries(path: Path, file: BinaryIO) -> dict[str, Entry]:
    start, count, directory = _directory(path, file)
    found: dict[str, Entry] = {}
    folders, position = set(), 0
    for _ in range(count):
        if position + CENTRAL.size > len(directory):
            raise _damaged(path)
        fields = CENTRAL.unpack_from(directory, position)
        ends = [position := position + size for size in (CENTRAL.size, *fields[10:13])]
        if fields[0] != b"PK\1\2":
            raise _damaged(path)
        name, extra = directory[ends[0] : ends[1]], directory[ends[1] : ends[2]]
        folder, inside = _checked_name(path, name, fields)
        if inside in found:
            raise UserError(f"{path} holds {inside} twice; torch.save writes it once")
        size, header = _wide(path, fields, extra)
        offset = _data_offset(path, file, header, name)
        if offset + size > start:
            raise UserError(f"{path}: {inside} should be {size:,} bytes, more than there are")
        found[inside] = Entry(path, inside, offset, size, fields[7])
        folders.add(folder)
    if position != len(directory) or len(folders) != 1:
        raise _damaged(path)
    return found


def _checked_name(path: Path, name: bytes, fields: tuple) -> tuple[str, str]:
    """The folder and the name inside it of an entry that is as torch.save writes them."""
    text = name.decode("utf-8", "replace")
    match = NAME.fullmatch(text)
    if match is None or match[1] in (".", ".."):
        raise UserError(f"{path} holds {text[:80]!a}, which torch.save never writes; not read")
    if fields[4] != 0 or fields[3] & 1 or fields[8] != fields[9]:
        raise UserError(f"{path} has {match[2]} compressed; torch.save only stores; not read")
    return match[1], match[2]


def _directory(path: Path, file: BinaryIO) -> tuple[int, int, bytes]:
    """Where the list of entries starts, how many there are, and the list."""
    length = file.seek(0, 2)
    end = length - END.size
    if end < 0 or _read(path, file, end, 4) != b"PK\5\6":
        raise UserError(f"{path} is cut short after {length:,} bytes; copy it again")
    *_, count, size, start, _ = END.unpack(_read(path, file, end, END.size))
    locator = end - LOCATOR.size
    if locator >= 0 and _read(path, file, locator, 4) == b"PK\6\7":
        end = LOCATOR.unpack(_read(path, file, locator, LOCATOR.size))[2]
        signature, *_, count, size, start = END64.unpack(_read(path, file, end, END64.size))
        if signature != b"PK\6\6":
            raise _damaged(path)
    if count > MOST_ENTRIES or size > LARGEST_DIRECTORY:
        raise UserError(f"{path} lists {count:,} entries; expected at most {MOST_ENTRIES:,}")
    return start, count, _read(path, file, start, size)


def _wide(path: Path, fields: tuple, extra: bytes) -> tuple[int, int]:
    """An entry's size and the place of its header, from 64 bits where 32 do not suffice."""
    size, stored, header = fields[9], fields[8], fields[16]
    wide = [number == 0xFFFFFFFF for number in (size, stored, header)]
    while any(wide) and len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1 and 8 * sum(wide) <= length <= len(extra) - 4:
            numbers = iter(struct.unpack_from(f"<{sum(wide)}Q", extra, 4))
            size, stored, header = (
                next(numbers) if is_wide else number
                for is_wide, number in zip(wide, (size, stored, header))
            )
            break
        extra = extra[4 + length :]
    if size != stored:
        raise _damaged(path)
    return size, header


def _data_offset(path: Path, file: BinaryIO, header: int, name: bytes) -> int:
    """Where an entry's bytes start, after its own header."""
    fields = LOCAL.unpack(_read(path, file, header, LOCAL.size))
    if fields[0] != b"PK\3\4":
        raise _damaged(path)
    if _read(path, file, header + LOCAL.size, fields[9]) != name:
        raise _damaged(path)
    return header + LOCAL.size + fields[9] + fields[10]


def _read(path: Path, file: BinaryIO, offset: int, size: int) -> bytes:
    """Exactly these bytes of the file."""
    length = file.seek(0, 2)
    if offset + size > length:
        raise _damaged(path)
    file.seek(offset)
    return file.read(size)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is a damaged zip; copy it again")
