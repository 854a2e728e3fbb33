"""The entry point of every command: arguments in, one-line errors and exit codes out.

A command is a module of this package with a `main(argv)`. Mistakes of the user end as one line on
stderr; `--debug`, understood by every command, shows the traceback too.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.cli.config_flags import CONFIG_FLAG
from llama_jax.cli.startup import skip_absent_tpu, use_huge_pages
from llama_jax.errors import (
    UsageError,
    UserError,
    did_you_mean,
    is_out_of_memory,
    out_of_memory_message,
)

ALIKE = 0.75  # how much a misspelt flag has of the one that was meant, at the least
# Training has its own, which knows the run's config.
MEMORY_ADVICE = "when sampling, try --quantize=int8, --cache_dtype=int8 or a smaller --max_context"


COMMANDS = {
    "train": "train a model from a config",
    "sample": "generate text with a trained or converted model",
    "chat": "talk with a model on the terminal",
    "prepare": "turn text into a folder of tokens to train on",
    "convert": "convert a model between formats",
    "convert-meta": "import Meta's Llama weights",
    "plan": "predict whether a run or a sampler fits on given devices",
    "plot": "draw the loss picture of a run",
}
ON_HUGE_PAGES = ("train", "sample", "chat")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"  # of the repository, where there is one


def main() -> NoReturn:
    """The console command `llama-jax COMMAND ...`."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.argv = [f"llama-jax {words[0]}", *words[1:]]
        run_command(words[0])
    listed = "\n".join(f"  {name:14}{what}" for name, what in COMMANDS.items())
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: llama-jax COMMAND ...\n\n{listed}\n")
        print("`llama-jax COMMAND --help` lists the flags of a command.")
        raise SystemExit(0 if words else 2)
    hint = did_you_mean(words[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
    print(f"error: {words[0]!r} is no command{hint}", file=sys.stderr)
    raise SystemExit(2)


def run_command(name: str) -> NoReturn:
    """Run a command with the words of `sys.argv` and exit with its code."""
    if name in ON_HUGE_PAGES:
        use_huge_pages()
    skip_absent_tpu()
    if name == "chat":
        name, sys.argv = "sample", [sys.argv[0], "--chat", *sys.argv[1:]]
    run(importlib.import_module(f"llama_jax.cli.{name.replace('-', '_')}").main)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call a command's `main` with the command line and exit with its code or its error's."""
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
    return out_of_memory_message(error, MEMORY_ADVICE) if is_out_of_memory(error) else None


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UsageError`s that name the nearest flag."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1:2 is a value, no flag

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What is known, and the words left for `read_config`; a misspelt flag is none of them."""
        known, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if hint := self._meant(word, ALIKE):
                raise UsageError(f"{word!r} is not understood{hint}")
        return known, unknown

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hint = self._meant(unknown[0]) or "; see --help"
            raise UsageError(f"{unknown[0]!r} is not understood{hint}")
        return known

    def _meant(self, word: str, alike: float = 0.5) -> str:
        """The clause that names the flag most like a word, if one is."""
        if not word.startswith("-") or CONFIG_FLAG.match(word):
            return ""
        flags = [flag for action in self._actions for flag in action.option_strings]
        return did_you_mean(word.split("=")[0], flags, alike)
