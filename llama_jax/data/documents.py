"""Documents out of text files, one after another, in little memory however long they are.

A document is stripped of blanks at both ends, and skipped if nothing is left. Does not know
tokens: it only promises that no cut it makes inside a document changes them.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_jax.data.json_texts import json_texts, jsonl_texts
from llama_jax.data.text_files import Reading, chunks, text_files

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
