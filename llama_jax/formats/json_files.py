"""JSON objects from strangers: small, without repeated keys or NaN, or refused in one line.

Does not know what the keys mean.
"""

import json
import math
import reprlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llama_jax.errors import UserError, describe_file

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
    if other := describe_file(data[:64]):
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


# The keys of a JSON object, looked up by type and range; complaints are gathered, not raised.
#
# Remembers which keys were asked for, so that the rest can be refused by name.

LISTED = 6  # complaints in a message
T = TypeVar("T")


class Fields:
    """Values by key. A look-up that finds something wrong notes it and gives the default."""

    def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
        """`within` is the key whose value they are, if they are not a whole file's."""
        self.values = values
        self.problems: list[str] = []
        self._prefix = f"{within}." if within else ""
        self._known: set[str] = set()

    def size(self, key: str, default: int, most: int) -> int:
        """A whole number from 1 to `most`."""
        value = self.value(key, default)
        is_good = type(value) is int and 1 <= value <= most
        return self._good(is_good, key, default, f"a whole number from 1 to {most}")

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.value(key, default)
        is_good = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
        return float(self._good(is_good, key, default, "a number"))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._good(type(self.value(key, default)) is bool, key, default, "true or false")

    def value(self, key: str, default: T) -> T:
        """Whatever is there."""
        self._known.add(key)
        return self.values.get(key, default)

    def require(self, key: str, expected: object) -> None:
        """Complain if the key has another value; its absence is fine."""
        value = self.value(key, expected)
        is_good = value == expected and isinstance(value, bool) == isinstance(expected, bool)
        self._good(is_good, key, expected, shown(expected))

    def complain(self, key: str, expected: str) -> None:
        """Note that the key's value is not as expected."""
        self.problems.append(f"{self._prefix}{key} = {shown(self.values.get(key))} ({expected})")

    def refuse_others(self, harmless: Container[str] = ()) -> None:
        """Complain about keys that were never asked for and are not known to be harmless."""
        for key, value in self.values.items():
            if key not in self._known and key not in harmless:
                name = key if key.isidentifier() and len(key) <= SHOWN else shown(key)
                self.problems.append(f"{self._prefix}{name} = {shown(value)}")

    def raise_problems(self, what: str) -> None:
        """`UserError` with all complaints in a line that begins with `what`, if there are any."""
        if self.problems:
            more = len(self.problems) - LISTED
            rest = f" and {more} more" if more > 0 else ""
            raise UserError(f"{what} {', '.join(self.problems[:LISTED])}{rest}")

    def _good(self, is_good: bool, key: str, default: T, expected: str) -> Any:
        if is_good:
            return self.values.get(key, default)
        self.complain(key, f"expected {expected}")
        return default
