"""Text files in chunks: which files a path means, and their UTF-8 with every error accounted for.

Does not know what a document is.
"""

import codecs
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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


# The texts in JSON files, one object after another, however long the file.
#
# Knows two layouts: a `.jsonl` file with an object on each line, and a `.json` file that is one
# list
# of objects, as TinyStories is. Does not know how texts become documents.

KEYS = ("text", "story")  # where an object has its text; the first that is there
DECODER = json.JSONDecoder(strict=False)  # plain newlines and tabs in strings are accepted
BLANKS_AND_COMMAS = re.compile(r"[\s,]*")
LONGEST_ESCAPE = 12  # characters of "\ud83d\ude42": closer to the end, an error may be a cut


def jsonl_texts(chunks: Iterable[str], file: Path, reading: Reading) -> Iterator[str]:
    """The text of the object on each line; blank lines are skipped.

    Raises:
      UserError: with the line's number, if it is no JSON object with a text.
    """
    for number, line in enumerate(_lines(chunks), start=1):
        if not line or line.isspace():
            continue
        where = f"{file}:{number}"
        try:
            value = DECODER.decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({_reason(error)}); mend the line") from error
        yield _text(value, where, reading)


def json_texts(chunks: Iterable[str], file: Path, reading: Reading) -> Iterator[str]:
    """The text of each object in the list that the file is.

    Raises:
      UserError: with the object's number, if it cannot be read, has no text, or is cut short.
    """
    for number, value in enumerate(_items(iter(chunks), file), start=1):
        yield _text(value, f"{file}: object {number}", reading)


def _text(value: Any, where: str, reading: Reading) -> str:
    """The text of an object, checked."""
    texts = [value[key] for key in KEYS if key in value] if isinstance(value, dict) else []
    if not texts or not isinstance(texts[0], str):
        expected = " or ".join(f'"{key}"' for key in KEYS)
        raise UserError(f"{where} has no text; expected an object with a string named {expected}")
    return without_surrogates(texts[0], where, reading)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """The lines of chunked text."""
    parts: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _items(chunks: Iterator[str], file: Path) -> Iterator[Any]:
    """The items of a JSON list, read with no more of it in memory than a chunk and an item."""
    held, at, count, is_open = "", 0, 0, False
    while True:
        at = BLANKS_AND_COMMAS.match(held, at).end()  # type: ignore[union-attr]
        if at == len(held):
            held, at = _more(chunks), 0
            if not held:
                raise UserError(f"{file} is cut short after {count} objects; copy it again")
        elif not is_open and held[at] == "[":
            is_open, at = True, at + 1
        elif is_open and held[at] == "]":
            return
        elif not is_open or held[at] != "{":
            raise UserError(f"{file} is not a JSON list of objects; see --help for what is read")
        else:
            item, held, at = _item(held[at:], chunks, f"{file}: object {count + 1}")
            count += 1
            yield item


def _item(held: str, chunks: Iterator[str], where: str) -> tuple[Any, str, int]:
    """The object that `held` begins with, the text now held, and where the object ends in it."""
    while True:
        try:
            item, end = DECODER.raw_decode(held)
            return item, held, end
        except RecursionError as error:
            raise UserError(f"{where} is nested too deeply; mend the file") from error
        except json.JSONDecodeError as error:
            may_be_cut = "Unterminated" in error.msg or error.pos + LONGEST_ESCAPE > len(held)
            more = _more(chunks, len(held)) if may_be_cut else ""
            if not more:
                raise UserError(f"{where} is not JSON ({error.msg}); mend the file") from error
            held += more


def _more(chunks: Iterator[str], at_least: int = 1) -> str:
    """The next chunks, empty at the end; doubling what is held keeps the work linear."""
    parts: list[str] = []
    length = 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length >= at_least:
            break
    return "".join(parts)


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"


# Documents out of text files, one after another, in little memory however long they are.
#
# A document is stripped of blanks at both ends, and skipped if nothing is left. Does not know
# tokens: it only promises that no cut it makes inside a document changes them.

END_OF_TEXT = "<|endoftext|>"  # the separator line that "auto" looks for
LOOKED_AT = 2**16  # bytes at the start of a file in which "auto" looks for it
LONGEST_SEPARATOR = 2**16  # characters; a line beyond this is passed on before its end is seen
LONGEST_PASSAGE = 2**20  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A document, or a part of a long one; its parts put together are the document.

    Parts are cut before a space between two words. SentencePiece makes no token across such a
    place, and the space it puts before every text stands for the one that the part begins with.
    Where 2^20 characters have no such place they are cut anywhere, and gain a space.
    """

    text: str
    is_first: bool  # the document starts here
    is_last: bool  # the document ends here


def read_documents(
    path: str | os.PathLike[str], split_at: str = "auto", reading: Reading | None = None
) -> Iterator[Passage]:
    """The documents of a file or of all files in a folder, as passages.

    Each object of a `.jsonl` or `.json` file is a document. A `.txt` file is one document with
    `split_at="none"`; with "blank" its documents are separated by blank lines, with any other text
    by lines of that text, with "auto" by "<|endoftext|>" if the file's beginning has such a line.

    Raises:
      UserError: if there is nothing to read or a file is damaged.
    """
    reading = reading or Reading()
    for file in text_files(path):
        yield from passages(_fragments(file, split_at, reading))


def passages(fragments: Iterable[str | None], longest: int = LONGEST_PASSAGE) -> Iterator[Passage]:
    """Passages of at most `longest` characters from text in which None ends a document."""
    held, is_first = "", True
    for fragment in fragments:
        if fragment is None:
            last = held.rstrip() or ("" if is_first else held)
            if last:
                yield Passage(last, is_first, is_last=True)
            held, is_first = "", True
            continue
        held = held + fragment if held or not is_first else fragment.lstrip()
        start = 0
        while len(held) - start > longest:
            cut = _place_to_cut(held, start, start + longest)
            yield Passage(held[start:cut], is_first, is_last=False)
            start, is_first = cut, False
        held = held[start:]


def _place_to_cut(text: str, start: int, end: int) -> int:
    """The last space between two words in text[start:end], or the end if there is none."""
    cut = text.rfind(" ", start + 1, end)
    while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
        cut = text.rfind(" ", start + 1, cut)
    return cut if cut > 0 else end


def _fragments(file: Path, split_at: str, reading: Reading) -> Iterator[str | None]:
    """The text of a file with None where a document ends."""
    text = chunks(file, reading)
    if file.suffix.lower() != ".txt":
        texts = jsonl_texts if file.suffix.lower() == ".jsonl" else json_texts
        for document in texts(text, file, reading):
            yield document
            yield None
        return
    separator = _separator(file, split_at)
    yield from text if separator is None else _split(text, separator)
    yield None


def _separator(file: Path, split_at: str) -> re.Pattern[str] | None:
    """What matches a separator line of the file with its newline, or None for no splitting."""
    line = "" if split_at == "blank" else END_OF_TEXT if split_at == "auto" else split_at
    if split_at == "none":
        return None
    pattern = re.compile(rf"^[ \t]*{re.escape(line)}[ \t]*\r?\n", re.MULTILINE)
    if split_at == "auto":
        with file.open("rb") as stream:
            beginning = stream.read(LOOKED_AT).decode("utf-8-sig", "replace")
        return pattern if pattern.search(beginning) else None
    return pattern


def _split(text: Iterable[str], separator: re.Pattern[str]) -> Iterator[str | None]:
    """Text with None in the place of separator lines, looked for in whole lines."""
    rest, is_line_start = "", True
    for chunk in itertools.chain(text, "\n"):
        rest += chunk
        if not is_line_start:  # the line that `rest` goes on with began with too much text
            end = rest.find("\n") + 1
            yield rest[: end or None]
            rest, is_line_start = rest[end:] if end else "", bool(end)
        end = rest.rfind("\n") + 1
        first, *others = separator.split(rest[:end])
        yield first
        for other in others:
            yield None
            yield other
        rest = rest[end:]
        if len(rest) > LONGEST_SEPARATOR:
            yield rest
            rest, is_line_start = "", False
