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

from llama_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json")
REPLACEMENT = "\ufffd"  # replaces bytes that are not UTF-8
LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass
class ReadState:
    """Settings and progress of state a corpus."""

    errors: str = "strict"  # or "replace": replace bytes that are not UTF-8 by U+FFFD
    block_bytes: int = 2**20  # read at once
    chunk_characters: int = 2**20  # longest chunk of a document
    replaced: int = 0  # characters replaced so far
    done: int = 0  # bytes read so far, or the unit that the corpus counts its size in


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


def read_documents(
    path: str | os.PathLike[str], split_at: str = "auto", state: ReadState | None = None
) -> Iterator[Chunk]:
    """Yield the documents of a file or of all files in a folder, in chunks.

    Each object of a `.jsonl` or `.json` file is a document. A `.txt` file is one document with
    `split_at="none"`; with "blank" its documents are separated by blank lines, with any other text
    by lines of that text, with "auto" by "<|endoftext|>" if the start of the file has such a line.

    Raises:
      UserError: if there is nothing to read or a file is damaged.
    """
    state = state or ReadState()
    for file in text_files(path):
        yield from split_documents(_fragments(file, split_at, state), state.chunk_characters)


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


def _fragments(file: Path, split_at: str, state: ReadState) -> Iterator[str | None]:
    """Yield the text of a file, and None where a document ends."""
    text = read_blocks(file, state)
    if file.suffix.lower() != ".txt":
        texts = jsonl_texts if file.suffix.lower() == ".jsonl" else json_texts
        for document in texts(text, file, state):
            yield document
            yield None
        return
    separator = _separator(file, split_at)
    yield from text if separator is None else _split(text, separator)
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


def text_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the text file at a path, or those in a folder and below, sorted by name.

    Raises:
      UserError: if there is none, or for a file of an unknown type.
    """
    path = Path(path)
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a {kinds} file, or a folder of them")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} has an unknown type; expected a {kinds} file")
        return (path,)
    files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
    found = tuple(sorted(file for file in files if file.suffix.lower() in SUFFIXES))
    if not found:
        raise UserError(f"{path} holds no text files; expected {kinds} files")
    return found


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def total_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size of the text files at a path."""
    return sum(file.stat().st_size for file in text_files(path))


def read_blocks(file: Path, state: ReadState) -> Iterator[str]:
    """Yield the text of a file in blocks, without the byte order mark.

    Raises:
      UserError: with the position of bytes that are not UTF-8, unless errors are replaced.
    """
    with file.open("rb") as stream:
        start, rest = 0, b""  # `rest` begins `start` bytes into the file
        while block := stream.read(state.block_bytes):
            state.done += len(block)
            if start == 0 and not rest and block.startswith(codecs.BOM_UTF8):
                start, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
            text, used = _decode(rest + block, file, start, state, final=False)
            start, rest = start + used, (rest + block)[used:]
            yield text
        yield _decode(rest, file, start, state, final=True)[0]


def _decode(data: bytes, file: Path, start: int, state: ReadState, final: bool) -> tuple[str, int]:
    """Return the text of the complete characters in `data`, and the bytes they take."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        if state.errors == "strict":
            position = start + error.start
            raise UserError(
                f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at position {position:,};"
                " convert it, or pass --errors replace"
            ) from error
        text, used = codecs.utf_8_decode(data, "replace", final)
        state.replaced += text.count(REPLACEMENT) - data[:used].count(REPLACEMENT.encode())
        return text, used


def without_surrogates(text: str, where: str, state: ReadState) -> str:
    """Return a text without lone surrogates, which JSON escapes such as "\\ud800" can produce.

    Raises:
      UserError: for a lone surrogate, unless errors are replaced.
    """
    if text.isascii():
        return text
    clean, count = LONE_SURROGATES.subn(REPLACEMENT, text)
    if count and state.errors == "strict":
        message = f"{where} has half a surrogate pair, which is not text; fix it"
        raise UserError(f"{message}, or pass --errors replace")
    state.replaced += count
    return clean


# ---- JSON Lines, and JSON files that are one list of objects ----

KEYS = ("text", "story")  # of the text in an object; the first one present
DECODER = json.JSONDecoder(strict=False)  # plain newlines and tabs in strings are accepted
BLANKS_AND_COMMAS = re.compile(r"[\s,]*")
LONGEST_ESCAPE = (
    12  # characters of "\ud83d\ude42"; an error this close to the end may be due to a cut
)


def jsonl_texts(blocks: Iterable[str], file: Path, state: ReadState) -> Iterator[str]:
    """Yield the text of the object on each line; blank lines are skipped.

    Raises:
      UserError: with the line number, for a line that is not a JSON object with a text.
    """
    for number, line in enumerate(_lines(blocks), start=1):
        if not line or line.isspace():
            continue
        where = f"{file}:{number}"
        try:
            value = DECODER.decode(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({_reason(error)}); fix the line") from error
        yield _text(value, where, state)


def json_texts(blocks: Iterable[str], file: Path, state: ReadState) -> Iterator[str]:
    """Yield the text of each object in the list.

    Raises:
      UserError: with the object's number, if it is invalid, has no text, or is truncated.
    """
    for number, value in enumerate(_items(iter(blocks), file), start=1):
        yield _text(value, f"{file}: object {number}", state)


def _text(value: Any, where: str, state: ReadState) -> str:
    """Return the text of an object; `UserError` if it has none."""
    texts = [value[key] for key in KEYS if key in value] if isinstance(value, dict) else []
    if not texts or not isinstance(texts[0], str):
        expected = " or ".join(f'"{key}"' for key in KEYS)
        raise UserError(f"{where} has no text; expected an object with a string named {expected}")
    return without_surrogates(texts[0], where, state)


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


def _items(blocks: Iterator[str], file: Path) -> Iterator[Any]:
    """Yield the items of a JSON list, with one block and one item in memory."""
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
            raise UserError(f"{file} is not a JSON list of objects; see --help for what is read")
        else:
            item, held, at = _item(held[at:], blocks, f"{file}: object {count + 1}")
            count += 1
            yield item


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


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
