"""Text files in chunks: which files a path means, and their UTF-8 with every error accounted for.

Does not know what a document is.
"""

import codecs
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json")
CHUNK = 2**20  # bytes read at once
UNKNOWN = "\ufffd"  # what stands for bytes that are no UTF-8
LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass
class Reading:
    """How far the reading of a corpus has come, and how strict it is."""

    errors: str = "strict"  # or "replace": put U+FFFD for what is no UTF-8, and count
    replaced: int = 0  # characters replaced so far
    done: int = 0  # bytes read so far, or whatever the corpus counts its size in


def text_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The text files that a path means: itself, or those in a folder and below, sorted by name.

    Raises:
      UserError: if there is none, or the file is of a kind that we cannot read.
    """
    path = Path(path)
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a {kinds} file, or a folder of them")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is of an unknown kind; expected a {kinds} file")
        return (path,)
    files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
    found = tuple(sorted(file for file in files if file.suffix.lower() in SUFFIXES))
    if not found:
        raise UserError(f"{path} holds no text; expected {kinds} files in that folder")
    return found


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def total_bytes(path: str | os.PathLike[str]) -> int:
    """The size of all text files that a path means."""
    return sum(file.stat().st_size for file in text_files(path))


def chunks(file: Path, reading: Reading) -> Iterator[str]:
    """The text of a file, some 2^20 characters at a time, without the byte order mark.

    Raises:
      UserError: where the file is no UTF-8, with the position, unless errors are to be replaced.
    """
    with file.open("rb") as stream:
        start, rest = 0, b""  # `rest` begins `start` bytes into the file
        while chunk := stream.read(CHUNK):
            reading.done += len(chunk)
            if start == 0 and not rest and chunk.startswith(codecs.BOM_UTF8):
                start, chunk = len(codecs.BOM_UTF8), chunk[len(codecs.BOM_UTF8) :]
            text, used = _decoded(rest + chunk, file, start, reading, final=False)
            start, rest = start + used, (rest + chunk)[used:]
            yield text
        yield _decoded(rest, file, start, reading, final=True)[0]


def _decoded(data: bytes, file: Path, start: int, reading: Reading, final: bool) -> tuple[str, int]:
    """The text of data as far as its characters are whole, and the bytes that it took."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        if reading.errors == "strict":
            position = start + error.start
            raise UserError(
                f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at position {position:,};"
                " convert it, or pass --errors replace"
            ) from error
        text, used = codecs.utf_8_decode(data, "replace", final)
        reading.replaced += text.count(UNKNOWN) - data[:used].count(UNKNOWN.encode())
        return text, used


def without_surrogates(text: str, where: str, reading: Reading) -> str:
    """A text that came from escapes such as "\\ud800", which can express what UTF-8 cannot.

    Raises:
      UserError: for a lone surrogate, unless errors are to be replaced.
    """
    if text.isascii():
        return text
    clean, count = LONE_SURROGATES.subn(UNKNOWN, text)
    if count and reading.errors == "strict":
        message = f"{where} has half a surrogate pair, which is no text; mend it"
        raise UserError(f"{message}, or pass --errors replace")
    reading.replaced += count
    return clean
