"""JSON objects from strangers: small, without repeated keys or NaN, or refused in one line.

Does not know what the keys mean.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.stand_ins import stand_in

LARGEST = 64 * 2**20  # bytes of a file; a tokenizer.json of 128,000 pieces has 9 MB
SHOWN = 60  # characters of a value in a message
SHORT = reprlib.Repr()  # does not spell out what will be cut
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 2 * SHOWN


def read_object(path: Path) -> dict[str, Any]:
    """The object that a file holds; `UserError` if it is too large or holds something else."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected JSON")
    size = path.stat().st_size
    if size > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; expected JSON of at most {LARGEST:,}")
    return parse_object(path.read_bytes(), path)


def parse_object(data: bytes, source: object) -> dict[str, Any]:
    """The object written in UTF-8; an error calls the place it comes from `source`."""
    if other := stand_in(data[:64]):
        raise UserError(f"{source} is {other}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown(error)
        raise UserError(f"{source} is not JSON: {reason}; copy the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} holds {shown(value)}; expected a JSON object, {{…}}")
    return value


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """A new file of indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shown(value: object) -> str:
    """A value as part of a line: cut when long, without line breaks."""
    text = str(value) if isinstance(value, Exception) else SHORT.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs; JSON itself would let the last of equal keys win."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} occurs twice")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
