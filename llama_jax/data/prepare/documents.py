"""Documents read from text, JSON Lines and JSON files, in little memory however long they are.

Files are read in blocks of text, split into documents, and long documents are split into chunks
between words, so that their tokens are those of the complete document. Leading and trailing
whitespace of a document is dropped, and empty documents are skipped.
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

from llama_jax.errors import UserError, is_utf16

SUFFIXES = (".txt", ".jsonl", ".json")
TEXT_FILES = ".txt, .jsonl or .json"
MOST_KEYS_SHOWN = 8  # of a JSON object, in a message
REPLACEMENT = "\ufffd"  # replaces bytes that are not UTF-8
LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How text files are read.

    With `split_at="none"` a `.txt` file is one document; with "blank" its documents are separated
    by blank lines, with any other text by lines of that text, with "auto" by "<|endoftext|>" if
    the start of the file has such a line.
    """

    split_at: str = "auto"
    text_keys: tuple[str, ...] = ("text", "story")  # of the text in a JSON object, in this order
    errors: str = "strict"  # or "replace": replace bytes that are not UTF-8 by U+FFFD
    block_bytes: int = 2**20  # read at once
    chunk_characters: int = 2**20  # longest chunk of a document


@dataclasses.dataclass
class ReadProgress:
    """Counters that are updated while a corpus is read."""

    done: int = 0  # bytes, or the unit that the corpus counts its size in
    replaced: int = 0  # characters replaced by U+FFFD


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A document, or a part of a long one; the concatenated parts are the document.

    Parts are cut before a space between two words: SentencePiece has no token across such a
    position, and the space that it adds before every text takes the place of that space. If a part
    has no such position, it is cut anywhere and gains a space.
    """

    text: str
    is_first: bool  # the document starts here
    is_last: bool  # the document ends here


# ---- documents ----

END_OF_TEXT = "<|endoftext|>"  # the separator line that "auto" looks for
AUTO_BYTES = 2**16  # at the start of a file, where "auto" looks for it
LONGEST_SEPARATOR = 2**16  # characters; longer lines are passed on before their end is read


def read_documents(file: Path, options: ReadOptions, progress: ReadProgress) -> Iterator[Chunk]:
    """Yield the documents of a file in chunks; each object of a JSON file is one.

    Raises:
      UserError: with the position in the file, if it is damaged or not of the expected form.
    """
    yield from split_documents(_fragments(file, options, progress), options.chunk_characters)


def split_documents(fragments: Iterable[str | None], longest: int) -> Iterator[Chunk]:
    """Yield chunks of at most `longest` characters from text in which None ends a document."""
    held, is_first = "", True
    for fragment in fragments:
        if fragment is None:
            last = held.rstrip() or ("" if is_first else held)
            if last:
                yield Chunk(last, is_first, is_last=True)
            held, is_first = "", True
            continue
        held = held + fragment if held or not is_first else fragment.lstrip()
        start = 0
        while len(held) - start > longest:
            cut = _cut_position(held, start, start + longest)
            yield Chunk(held[start:cut], is_first, is_last=False)
            start, is_first = cut, False
        held = held[start:]


def _cut_position(text: str, start: int, end: int) -> int:
    """Return the last space between two words in text[start:end], or `end` if there is none."""
    cut = text.rfind(" ", start + 1, end)
    while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
        cut = text.rfind(" ", start + 1, cut)
    return cut if cut > 0 else end


def _fragments(file: Path, options: ReadOptions, progress: ReadProgress) -> Iterator[str | None]:
    """Yield the text of a file, and None where a document ends."""
    if file.suffix.lower() not in (".jsonl", ".json"):
        text = read_blocks(file, options, progress)
        separator = _separator(file, options.split_at)
        yield from text if separator is None else _split(text, separator)
        yield None
        return
    for where, value in read_objects(file, options, progress):
        yield _text(value, where, options, progress)
        yield None


def _separator(file: Path, split_at: str) -> re.Pattern[str] | None:
    """Return a pattern for a separator line with its newline, or None for no splitting."""
    line = "" if split_at == "blank" else END_OF_TEXT if split_at == "auto" else split_at
    if split_at == "none":
        return None
    pattern = re.compile(rf"^[ \t]*{re.escape(line)}[ \t]*\r?\n", re.MULTILINE)
    if split_at == "auto":
        with file.open("rb") as stream:
            head = stream.read(AUTO_BYTES).decode("utf-8-sig", "replace")
        return pattern if pattern.search(head) else None
    return pattern


def _split(text: Iterable[str], separator: re.Pattern[str]) -> Iterator[str | None]:
    """Yield text with None in place of separator lines, which are matched in complete lines."""
    rest, is_line_start = "", True
    for block in itertools.chain(text, "\n"):
        rest += block
        if not is_line_start:  # `rest` continues a line that is too long for a separator
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


# ---- files and blocks of text ----


def find_text_files(
    paths: Iterable[str | os.PathLike[str]], suffixes: tuple[str, ...] = SUFFIXES
) -> tuple[list[Path], list[Path]]:
    """Return the files with one of some suffixes among some paths, and those that were skipped.

    Folders are searched with all folders in them, in the order of names, except for hidden ones;
    what has another suffix there is skipped. A file that occurs twice is returned once.

    Raises:
      UserError: if a path does not exist, is a file of another type, or is a folder without text.
    """
    expected = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    files: dict[Path, Path] = {}
    skipped: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(
                f"{path} does not exist; expected a {expected} file or a folder of them"
            )
        if path.is_file():
            found = [path]
            if path.suffix.lower() not in suffixes:
                raise UserError(f"{path} has an unknown type; expected a {expected} file")
        else:
            inside = sorted(file for file in path.rglob("*") if not _is_hidden(file, path))
            found = [file for file in inside if file.is_file() and file.suffix.lower() in suffixes]
            # The search does not follow links to folders.
            leaves = {file for file in inside if file.is_file() or file.is_symlink()}
            skipped += sorted(leaves.difference(found))
            if not found:
                raise UserError(f"{path} holds no text files; expected {expected} files")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values()), skipped


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def read_blocks(file: Path, options: ReadOptions, progress: ReadProgress) -> Iterator[str]:
    """Yield the text of a file in blocks, without the byte order mark.

    Raises:
      UserError: with the position of bytes that are not UTF-8, unless errors are replaced.
    """
    with file.open("rb") as stream:
        start, rest = 0, b""  # `rest` begins `start` bytes into the file
        while block := stream.read(options.block_bytes):
            progress.done += len(block)
            if start == 0 and not rest and block.startswith(codecs.BOM_UTF8):
                start, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
            data = rest + block
            text, used = _decode(data, file, start, options.errors, final=False)
            progress.replaced += _count_replaced(text, data[:used])
            start, rest = start + used, data[used:]
            yield text
        text, _ = _decode(rest, file, start, options.errors, final=True)
        progress.replaced += _count_replaced(text, rest)
        yield text


def _decode(data: bytes, file: Path, start: int, errors: str, final: bool) -> tuple[str, int]:
    """Return the text of the complete characters in `data`, and the bytes they take."""
    try:
        return codecs.utf_8_decode(data, errors, final)
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {start + error.start:,}"
        if start == 0 and is_utf16(data):
            raise UserError(f"{file} is UTF-16; expected UTF-8: convert it") from error
        advice = "convert it, or pass --errors replace"
        raise UserError(f"{file} is not UTF-8: {where}; {advice}") from error


def _count_replaced(text: str, data: bytes) -> int:
    """Return how many U+FFFD a text has that are not in its bytes."""
    return text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())


# ---- JSON Lines, and JSON files that are one list of objects ----

# Plain newlines and tabs in strings are accepted, and integers too long for Python's int.
DECODER = json.JSONDecoder(strict=False, parse_int=float)
BLANKS_AND_COMMAS = re.compile(r"[\s,]*")
# Characters of "\ud83d\ude42"; an error this close to the end may be due to a cut.
LONGEST_ESCAPE = 12


def read_objects(
    file: Path, options: ReadOptions, progress: ReadProgress
) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each object of a .jsonl or .json file.

    Raises:
      UserError: with the position of what is not JSON, or not an object.
    """
    objects = _jsonl_objects if file.suffix.lower() == ".jsonl" else _json_objects
    yield from objects(read_blocks(file, options, progress), file)


def _jsonl_objects(blocks: Iterable[str], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line; blank lines are skipped."""
    for number, line in enumerate(_lines(blocks), start=1):
        if not line or line.isspace():
            continue
        try:
            yield f"{file}:{number}", DECODER.decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            advice = "name the file .json" if line.lstrip().startswith("[") else "fix the line"
            raise UserError(f"{file}:{number} is not JSON ({reason}); {advice}") from error


def _text(value: Any, where: str, options: ReadOptions, progress: ReadProgress) -> str:
    """Return the text of an object, without lone surrogates, which JSON escapes can produce."""
    content = value if isinstance(value, dict) else {}
    text = next((content[key] for key in options.text_keys if key in content), None)
    if not isinstance(text, str):
        expected = " or ".join(f'"{key}"' for key in options.text_keys)
        message = f"{where} has no text; expected an object with a string named {expected}"
        others = [key for key in content if isinstance(content[key], str)][:MOST_KEYS_SHOWN]
        if others:
            message += f", or --text_key with one of {', '.join(others)}"
        raise UserError(message)
    if text.isascii():
        return text
    clean, count = LONE_SURROGATES.subn(REPLACEMENT, text)
    if count and options.errors == "strict":
        message = f"{where} has half a surrogate pair, which is not text; fix it"
        raise UserError(f"{message}, or pass --errors replace")
    progress.replaced += count
    return clean


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of text in blocks."""
    parts: list[str] = []
    for block in blocks:
        first, *others = block.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _json_objects(text: Iterable[str], file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each object in a list, with one block in memory."""
    blocks = iter(text)
    held, at, count, is_open = "", 0, 0, False
    while True:
        at = BLANKS_AND_COMMAS.match(held, at).end()  # type: ignore[union-attr]
        if at == len(held):
            held, at = _more(blocks), 0
            if not held:
                raise UserError(f"{file} is truncated after {count} objects; copy it again")
        elif not is_open and held[at] == "[":
            is_open, at = True, at + 1
        elif is_open and held[at] == "]":
            return
        elif not is_open or held[at] != "{":
            advice = "; name a file with an object on each line .jsonl"
            raise UserError(f"{file} is not a JSON list of objects{advice * (held[at] == '{')}")
        else:
            count += 1
            where = f"{file}: object {count}"
            item, held, at = _item(held[at:], blocks, where)
            yield where, item


def _item(held: str, blocks: Iterator[str], where: str) -> tuple[Any, str, int]:
    """Return the object at the start of `held`, the text now held, and the object's end in it."""
    while True:
        try:
            item, end = DECODER.raw_decode(held)
            return item, held, end
        except RecursionError as error:
            raise UserError(f"{where} is nested too deeply; fix the file") from error
        except json.JSONDecodeError as error:
            may_be_cut = "Unterminated" in error.msg or error.pos + LONGEST_ESCAPE > len(held)
            more = _more(blocks, len(held)) if may_be_cut else ""
            if not more:
                raise UserError(f"{where} is not JSON ({error.msg}); fix the file") from error
            held += more


def _more(blocks: Iterator[str], at_least: int = 1) -> str:
    """Return at least so many characters more, or fewer at the end.

    Asking for as many as are held keeps the total work linear.
    """
    parts: list[str] = []
    length = 0
    for block in blocks:
        parts.append(block)
        length += len(block)
        if length >= at_least:
            break
    return "".join(parts)
