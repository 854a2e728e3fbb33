"""Configs to and from plain nested mappings: ConfigDicts of config files, JSON of checkpoints.

Unknown keys and wrong types are refused here; ranges are the business of `config`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from llama_jax.config import require
from llama_jax.errors import UsageError, nearest

T = TypeVar("T")


def as_config_dict(config: Any) -> Any:
    """The `ml_collections.ConfigDict` of a config, whose fields flags can override."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(config))


def parse(cls: type[T], tree: Mapping[str, Any], prefix: str = "", where: str = "") -> T:
    """A `cls` made from nested mappings such as a ConfigDict or JSON.

    Args:
      prefix: what the names of these keys begin with, in complaints.
      where: the file that should have them, likewise.

    Raises:
      UsageError: for a key that is unknown (with the nearest name) or missing, or a value of the
        wrong type (with key and expected type). Whole numbers are accepted for floats.
    """
    if not isinstance(tree, Mapping) and not hasattr(tree, "keys"):
        raise UsageError(f"{prefix or 'the config'} is {tree!r}; expected a section with keys")
    hints, there = get_type_hints(cls), f" in {where}" if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        key = f"{prefix}{name}"
        require(name in fields, f"unknown key {key!r}{there}{nearest(str(name), fields)}")
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _parse_value(hints[name], tree[name], prefix + name, where)
        else:
            expected = spelled(hints[name])
            message = f"key {prefix + name!r} is missing{there}; expected {expected}"
            require(field.default is not dataclasses.MISSING, message)
    return cls(**values)


def _parse_value(expected: Any, value: Any, key: str, where: str) -> Any:
    """`value` as the expected type, or a `UsageError` naming the key."""
    if dataclasses.is_dataclass(expected):
        require(
            isinstance(value, Mapping) or hasattr(value, "keys"),
            f"{key}={value!r} has the wrong type; expected a section with keys",
        )
        return parse(expected, value, key + ".", where)  # type: ignore[arg-type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    matches = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    require(matches, f"{key}={value!r} has the wrong type; expected {spelled(expected)}")
    return value


def spelled(expected: Any) -> str:
    """The name of a type as a user would say it."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    return names.get(expected, "a section with keys")
