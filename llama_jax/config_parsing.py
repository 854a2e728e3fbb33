"""Parsing of configs: dataclasses from nested mappings, a config file's or a checkpoint's JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from llama_jax.errors import UsageError, did_you_mean, require, shown

T = TypeVar("T")
TYPE_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


def parse(cls: type[T], tree: Mapping[str, Any], prefix: str = "", where: str = "") -> T:
    """Return a `cls` built from nested mappings such as a ConfigDict or JSON.

    Args:
      prefix: of the keys' names in messages.
      where: the file that the mapping comes from, for messages.

    Raises:
      UsageError: for a key that is unknown (with the closest name) or missing, for a value of the
        wrong type (with key and expected type) or out of range. An int is accepted for a float.
    """
    hints, in_file = get_type_hints(cls), f" in {where}" if where else ""
    is_section = isinstance(tree, Mapping) or hasattr(tree, "keys")
    require(is_section, f"{prefix or 'the config'} is {shown(tree)}; expected a section with keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = next((name for name in tree if name not in fields), None)
    if unknown is not None:  # finding similar names takes its time
        known = did_you_mean(str(unknown), fields)
        raise UsageError(f"unknown key {f'{prefix}{unknown}'!r}{in_file}{known}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _parse_value(hints[name], tree[name], prefix + name, where)
        else:
            expected = type_name(hints[name])
            message = f"key {prefix + name!r} is missing{in_file}; expected {expected}"
            require(field.default is not dataclasses.MISSING, message)
    return cls(**values)


def _parse_value(expected: Any, value: Any, key: str, where: str) -> Any:
    """Return `value` as the expected type."""
    if dataclasses.is_dataclass(expected):
        require(
            isinstance(value, Mapping) or hasattr(value, "keys"),
            f"{key}={shown(value)} has the wrong type; expected a section with keys",
        )
        return parse(expected, value, key + ".", where)  # type: ignore[arg-type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    matches = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    require(matches, f"{key}={shown(value)} has the wrong type; expected {type_name(expected)}")
    return value


def type_name(expected: Any) -> str:
    """Return the name of a field's type for messages."""
    return TYPE_NAMES.get(expected, "a section with keys")
