"""The texts in JSON files, one object after another, however long the file.

Knows two layouts: a `.jsonl` file with an object on each line, and a `.json` file that is one list
of objects, as TinyStories is. Does not know how texts become documents.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.data.text_files import Reading, without_surrogates
from llama_jax.errors import UserError

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
