"""What every door shares: flags in, one-line errors and exit codes out.

A door is `run(main)` around a function of the command line's words. Mistakes of the user end as
one line on stderr; `--debug`, understood by every door, shows the traceback too.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.config_parsing import spelled
from llama_jax.errors import UsageError, UserError, nearest
from llama_jax.out_of_memory import explanation, is_out_of_memory

CONFIG_FLAG = re.compile(r"^--(no)?config\.(?P<key>[^=]+)(=(?P<value>.*))?$", re.DOTALL)
# Training has its own, which knows the run's config.
MEMORY_ADVICE = "when sampling, try --quantize=int8, --cache_dtype=int8 or a smaller --max_context"


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call a door's `main` with the command line and exit with its code or its error's."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as in `| head -1`: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = one_line(error)
        if debug or line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    raise SystemExit(code)


def one_line(error: Exception) -> str | None:
    """The line to show for a mistake that a user can mend, or None for a fault of ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return explanation(error, MEMORY_ADVICE) if is_out_of_memory(error) else None


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UsageError`s that name the nearest flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(unknown[0].split("=")[0], flags)
            raise UsageError(f"{unknown[0]!r} is not understood{hint or '; see --help'}")
        return known


def config_from_flags(argv: Sequence[str], default: str) -> Any:
    """The ConfigDict of `--config FILE` with every `--config.key=value` applied, in any order.

    Raises:
      UsageError: for a stray word, a file that is missing or broken, a key that is unknown, a
        value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    path, overrides = _split_config_flags(argv, default)
    config = _load(path)
    leaves = _leaves(config)
    overrides = [_checked(word, path, leaves) for word in overrides]
    values, words = flags.FlagValues(), [sys.argv[0], *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    try:
        values(words)
    except flags.IllegalFlagValueError as error:
        word = next((word for word in overrides if word in str(error)), overrides[0])
        raise UsageError(_wrong_type(word, leaves)) from error
    return config


def _split_config_flags(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The config's path, and the overrides as `--config.key=value` words."""
    path, overrides, words = default, [], list(argv)
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
            is_pair = "=" in word and not word.startswith("-")
            section = "" if "." in word.partition("=")[0] else "SECTION."
            example = f"; did you mean --config.{section}{word}" if is_pair else "; see --help"
            raise UsageError(f"{word!r} is not understood{example}")
    return path, overrides


def _load(path: str) -> Any:
    """The ConfigDict that a config file's `get_config()` returns."""
    if not Path(path).is_file():
        known = sorted(str(file) for file in Path("configs").glob("*.py"))
        there = f"there are {', '.join(known)}" if known else "expected one like configs/demo.py"
        raise UsageError(
            f"config file {path!r} does not exist{nearest(path, known) or '; ' + there}"
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
        hint = f"; did you mean {tails[tail[0]]!r}?" if tail else nearest(key, leaves)
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
    return f"config.{key}={value!r} has the wrong type; expected {spelled(type(leaves[key]))}"
