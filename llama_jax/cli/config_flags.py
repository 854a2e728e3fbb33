"""A run's config from the command line: `--config FILE` and `--config.key=value`, in any order.

Does not know the other flags of a door; words that are neither are refused with what may be meant.
"""

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import Config, parse, type_name
from llama_jax.errors import UsageError, UserError, did_you_mean

CONFIG_FLAG = re.compile(r"^--(no)?config\.(?P<key>[^=]+)(=(?P<value>.*))?$", re.DOTALL)


def read_config(argv: Sequence[str], default: str) -> Config:
    """The `Config` of `--config FILE` and `--config.key=value`; see `config_from_flags`.

    Raises:
      UsageError: also for a file without a key that it should have, for a value out of range.
    """
    path, overrides, strays = _split_config_flags(argv, default)
    return parse(Config, _overridden(path, overrides, strays), where=path)


def config_from_flags(argv: Sequence[str], default: str) -> Any:
    """The ConfigDict of `--config FILE` with every `--config.key=value` applied, in any order.

    Raises:
      UsageError: for a stray word, a file that is missing or broken, a key that is unknown, a
        value of the wrong type.
    """
    return _overridden(*_split_config_flags(argv, default))


def _overridden(path: str, overrides: list[str], strays: list[str]) -> Any:
    """The ConfigDict of a file with overrides applied; strays are refused."""
    from absl import flags
    from ml_collections import config_flags

    config = _load(path)
    leaves = _leaves(config)
    if strays:
        raise UsageError(_not_understood(strays[0], leaves))
    overrides = [_checked(word, path, leaves) for word in overrides]
    values, words = flags.FlagValues(), [sys.argv[0], *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    try:
        values(words)
    except flags.IllegalFlagValueError as error:
        word = next((word for word in overrides if word in str(error)), overrides[0])
        raise UsageError(_wrong_type(word, leaves)) from error
    return config


def _split_config_flags(argv: Sequence[str], default: str) -> tuple[str, list[str], list[str]]:
    """The config's path, the overrides as `--config.key=value` words, and what is neither."""
    path, overrides, strays, words = default, [], [], list(argv)
    while words:
        word = words.pop(0)
        override = CONFIG_FLAG.match(word)
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or (words.pop(0) if words else "")
            if not path:
                raise UsageError("--config names no file; for example --config configs/demo.py")
        elif override and override["value"] is not None and not override[1]:
            overrides.append(word)
        elif override and override["value"] is None:
            is_switch = override[1] or not words or words[0].startswith("--")
            overrides.append(word if is_switch else f"{word}={words.pop(0)}")
        else:
            strays.append(word)
    return path, overrides, strays


def _not_understood(word: str, leaves: dict[str, Any]) -> str:
    """The complaint about a word that is no flag, with the config's keys that may be meant."""
    name, equals, value = word.lstrip("-").partition("=")
    meant = [leaf for leaf in leaves if name in (leaf, leaf.split(".")[-1])]
    if equals and not meant and not word.startswith("-"):
        meant = [name if "." in name else f"SECTION.{name}"]
    is_key = equals or word.startswith("--")
    examples = " or ".join(f"--config.{key}{equals}{value}" for key in meant if is_key)
    hint = f"; did you mean {examples}" if examples else "; see --help"
    return f"{word!r} is not understood{hint}"


def _load(path: str) -> Any:
    """The ConfigDict that a config file's `get_config()` returns."""
    if not Path(path).is_file():
        known = sorted(str(file) for file in Path("configs").glob("*.py"))
        there = f"there are {', '.join(known)}" if known else "expected one like configs/demo.py"
        raise UsageError(
            f"config file {path!r} does not exist{did_you_mean(path, known) or '; ' + there}"
        )
    scope: dict[str, Any] = {"__file__": path, "__name__": "config"}
    try:
        exec(compile(Path(path).read_text(), path, "exec"), scope)
        if "get_config" not in scope:
            raise UsageError(f"{path} defines no get_config(); see configs/demo.py")
        config = scope["get_config"]()
        if not hasattr(config, "items"):
            raise UsageError(f"{path}: get_config() returns {config!r}; expected a ConfigDict")
        return config
    except UserError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UsageError(f"{path} fails: {type(error).__name__}: {error}") from error


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a ConfigDict by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = hasattr(value, "items")
        leaves |= _leaves(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return leaves


def _checked(word: str, path: str, leaves: dict[str, Any]) -> str:
    """An override with its value written out, if the config has its key; else the nearest."""
    match = CONFIG_FLAG.match(word)
    key, value = match["key"], match["value"]  # type: ignore[index]
    if key not in leaves:
        tails = {leaf.split(".")[-1]: leaf for leaf in leaves}
        tail = difflib.get_close_matches(key.split(".")[-1], tails, n=1)
        hint = f"; did you mean {tails[tail[0]]!r}?" if tail else did_you_mean(key, leaves)
        raise UsageError(f"{path} has no key {key!r}{hint or '; see configs/demo.py'}")
    if value is not None:
        return word
    if not isinstance(leaves[key], bool):
        example = f"--config.{key}={leaves[key]}"
        raise UsageError(f"{word} has no value; expected one, as in {example}")
    return f"--config.{key}={'false' if match[1] else 'true'}"  # type: ignore[index]


def _wrong_type(word: str, leaves: dict[str, Any]) -> str:
    """The complaint about an override whose value does not fit its key."""
    match = CONFIG_FLAG.match(word)
    key, value = match["key"], match["value"]  # type: ignore[index]
    return f"config.{key}={value!r} has the wrong type; expected {type_name(type(leaves[key]))}"
