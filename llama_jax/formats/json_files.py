"""JSON objects from unknown sources: of bounded size, without repeated keys or NaN."""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llama_jax.errors import UserError, describe_file

MAX_BYTES = 64 * 2**20  # of a file; a tokenizer.json of 128,000 pieces has 9 MB
MAX_SHOWN = 60  # characters of a value in a message
MAX_LISTED = 6  # problems in a message
SHORT = reprlib.Repr()  # does not format what will be cut
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 2 * MAX_SHOWN
T = TypeVar("T")


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file; `UserError` if it is too large or holds something else."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected JSON")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; expected JSON of at most {MAX_BYTES:,}")
    return parse_object(path.read_bytes(), path)


def parse_object(data: bytes, source: object) -> dict[str, Any]:
    """Return the object in UTF-8 data; messages name its `source`."""
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
    """Write a new file of indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shown(value: object) -> str:
    """Return a value as part of a message: cut if long, without line breaks."""
    text = str(value) if isinstance(value, Exception) else SHORT.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def shown_key(key: str) -> str:
    """Return a key as part of a message: as it is if it reads like a name."""
    return key if key.isidentifier() and len(key) <= MAX_SHOWN else shown(key)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of pairs, where `json` would keep the last of equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} occurs twice")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


class Fields:
    """The keys of an object, looked up by type and range.

    Problems are collected, and the default returned; keys that were never looked up can be refused.
    """

    def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
        """`within` is the key whose value they are, if they are not a whole file's."""
        self.values = values
        self.problems: list[str] = []
        self._prefix = f"{within}." if within else ""
        self._known: set[str] = set()

    def size(self, key: str, default: int, largest: int) -> int:
        """Return an integer from 1 to `largest`."""
        value = self.value(key, default)
        is_good = type(value) is int and 1 <= value <= largest
        return self._checked(is_good, key, default, f"an integer from 1 to {largest}")

    def number(self, key: str, default: float) -> float:
        """Return a finite number."""
        value = self.value(key, default)
        is_good = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
        return float(self._checked(is_good, key, default, "a number"))

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        return self._checked(type(self.value(key, default)) is bool, key, default, "true or false")

    def value(self, key: str, default: T) -> T:
        """Return any value."""
        self._known.add(key)
        return self.values.get(key, default)

    def require(self, key: str, expected: object) -> None:
        """Note a problem if the key has another value; it may be absent."""
        value = self.value(key, expected)
        is_good = value == expected and isinstance(value, bool) == isinstance(expected, bool)
        self._checked(is_good, key, expected, shown(expected))

    def complain(self, key: str, expected: str) -> None:
        """Note that the key's value is not as expected."""
        self.problems.append(f"{self._prefix}{key} = {shown(self.values.get(key))} ({expected})")

    def others(self) -> list[str]:
        """Return the keys that were never looked up and are set: null, false, 0 or [] are not."""
        return [key for key, value in self.values.items() if key not in self._known and value]

    def refuse_others(self) -> None:
        """Note a problem for each of `others`."""
        for key in self.others():
            self.refuse(key)

    def refuse(self, key: str) -> None:
        """Note that a key of any name is not understood."""
        self.problems.append(f"{self._prefix}{shown_key(key)} = {shown(self.values[key])}")

    def raise_problems(self, what: str) -> None:
        """Raise `UserError` with all problems in a line that begins with `what`, if any."""
        if self.problems:
            more = len(self.problems) - MAX_LISTED
            rest = f" and {more} more" if more > 0 else ""
            raise UserError(f"{what} {', '.join(self.problems[:MAX_LISTED])}{rest}")

    def _checked(self, is_good: bool, key: str, default: T, expected: str) -> Any:
        if is_good:
            return self.values.get(key, default)
        self.complain(key, f"expected {expected}")
        return default
