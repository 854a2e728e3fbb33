"""The keys of a JSON object, looked up by type and range; complaints are gathered, not raised.

Remembers which keys were asked for, so that the rest can be refused by name.
"""

import math
from collections.abc import Container, Mapping
from typing import Any, TypeVar

from llama_jax.errors import UserError
from llama_jax.formats.json_object import SHOWN, shown

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
