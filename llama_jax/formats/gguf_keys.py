"""The keys of a GGUF file, looked up by the type that they should have."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError

Value = int | float | bool | str | np.ndarray | list[str]


@dataclasses.dataclass(frozen=True)
class Keys:
    """Values by their names. A look-up without a default complains if the key is missing."""

    path: Path  # of the file, for messages
    values: Mapping[str, Value]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, whole or not."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings")
        return value

    def numbers(self, key: str) -> np.ndarray:
        """An array of numbers."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray):
            raise self._wrong(key, "a list of numbers")
        return value

    def shown(self, key: str) -> str:
        """A value as a message can show it."""
        value = self.values[key]
        return "a list" if isinstance(value, list | np.ndarray) else repr(value)[:64]

    def _get(self, key: str, default: Value | None) -> Value:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no key {key}; convert the model to GGUF again")
        return value

    def _wrong(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.path} has {key} = {self.shown(key)}; expected {expected}")
