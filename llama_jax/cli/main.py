"""The entry point of every command: run it, print errors as one line, exit with a code.

A command is a module of this package with a `main(argv)`. Every error is one line on stderr: how to
fix it or, for a bug, how to report it. With `--debug`, which every command takes, it is a
traceback.
"""

import argparse
import atexit
import contextlib
import difflib
import importlib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.cli.config_flags import CONFIG_FLAG
from llama_jax.cli.startup import (
    absent_platform_message,
    skip_absent_tpu,
    use_gpu_flags,
    use_huge_pages,
)
from llama_jax.errors import (
    UsageError,
    UserError,
    as_started,
    did_you_mean,
    escape_controls,
    format_line,
    is_out_of_memory,
    out_of_memory_message,
)

COMMANDS = {
    "train": "train a model from a config",
    "sample": "generate text with a trained or converted model",
    "chat": "chat with a model in the terminal",
    "serve": "serve models over HTTP, with a chat page",
    "evaluate": "perplexity of texts, and accuracy on tasks",
    "prepare": "turn text into a folder of tokens to train on",
    "convert": "convert a model between formats",
    "convert-meta": "import Meta's Llama weights",
    "plan": "predict whether training or sampling fits on given devices",
    "plot": "draw the loss curve of a run, or compare several",
    "study": "compare position encodings by training small models",
    "doctor": "report versions, devices, cache and extras, with advice",
}
TRAINING, DECODING = ("train", "study"), ("sample", "chat", "serve")
ON_HUGE_PAGES = (*TRAINING, *DECODING, "evaluate")
SIMILAR = 0.75  # similarity from which an unknown flag is taken for a misspelt one
FLAG_ALIASES = {  # other projects' names of flags
    "checkpoint": "--ckpt",
    "max_length": "--max_tokens",
    "max_new_tokens": "--max_tokens",
    "model": "--ckpt",
    "n": "--num_samples",
    "temp": "--temperature",
}
MAX_BUG = 300  # characters of the text of an unexpected error
# Training gives its own advice, which depends on the config of the run.
MEMORY_ADVICE = "when sampling, try --quantize=int8, --cache_dtype=int8 or a smaller --max_context"


def main() -> NoReturn:
    """Run the console command `llama-jax COMMAND ...`."""
    make_output_safe()
    words = sys.argv[1:]
    debug = ["--debug"] if words[:1] == ["--debug"] else []
    words = words[len(debug) :]
    if words and words[0] in COMMANDS:
        sys.argv = [f"llama-jax {words[0]}", *debug, *words[1:]]
        run_command(words[0])
    if not words or words[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:14}{purpose}" for name, purpose in COMMANDS.items())
        print(f"usage: llama-jax COMMAND ...\n\n{commands}\n")
        print("`llama-jax COMMAND --help` lists the flags of a command.")
        raise SystemExit(0 if words else 2)
    hint = did_you_mean(words[0], COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
    print(format_line(f"error: unknown command {words[0]!r}{hint}"), file=sys.stderr)
    raise SystemExit(2)


def run_command(name: str) -> NoReturn:
    """Run a command with the arguments in `sys.argv` and exit with its code."""
    if name == "chat":
        has_path = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
        sys.argv[1:1] = ["--chat", "--ckpt"] if has_path else ["--chat"]
    module = "sample" if name == "chat" else name.replace("-", "_")

    def main(argv: list[str]) -> int | None:
        if name in ON_HUGE_PAGES:
            use_huge_pages()
        skip_absent_tpu()
        if name in (*TRAINING, *DECODING):
            purpose = "training" if name in TRAINING else "decoding"
            use_gpu_flags(purpose, is_distributed="--distributed" in argv)
        with _ended_by_interrupts():
            command = importlib.import_module(f"llama_jax.cli.{module}")
        return command.main(argv)

    try:
        run(main)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            _leave(end.code)
        raise


def _leave(code: int) -> NoReturn:
    """End the process after an error without waiting for threads that libraries have left.

    Those of a failed save wait for minutes. Those at work in C++ abort a Python that takes itself
    apart when they come back to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process, not raise `KeyboardInterrupt`, while the block imports modules.

    Raised while C++ of jaxlib sets up its modules, it would abort the process with messages.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, in background
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call the `main` of a command with the command line and exit with its code."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    make_output_safe()
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as in `| head -1`
        discard_output()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if was_interrupted(error):
            raise SystemExit(130) from None
        if debug:
            raise
        line = one_line(error) or bug_report(error)
        print(f"error: {format_line(line)}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
        try:
            sys.stdout.flush()
        except OSError:  # the disk is full, which the exit of the interpreter would report again
            discard_output()
    raise SystemExit(code)


def make_output_safe() -> None:
    """Let stdout and stderr accept any text: in any encoding, closed, or a terminal.

    Characters that the encoding lacks are escaped. So are control characters on a terminal, which
    a file name or the text of a model could reprogram; pipes and files get them unchanged.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed; a file opened later must not get its descriptor
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", closefd=False))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            if stream.isatty():
                write = stream.write
                stream.write = lambda text, write=write: write(escape_controls(text))


def discard_output() -> None:
    """Send what is still to be written to stdout nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error, which an import may raise in its place."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: Exception) -> str | None:
    """Return the message for an error that a user can fix, or None for a bug in this package."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    if is_out_of_memory(error):
        return out_of_memory_message(error, MEMORY_ADVICE)
    return absent_platform_message(error) or None


def bug_report(error: Exception) -> str:
    """Return the message for a bug in this package: what failed, where, and how to report it."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).resolve().parents[1])
    ours = [frame for frame in frames if frame.filename.startswith(package)] or frames
    where = f" in {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    text = format_line(str(error))[:MAX_BUG]
    return (
        f"{type(error).__name__}{where}{': ' if text else ''}{text}; this is a bug in llama_jax:"
        " run the command again with --debug and report what it prints"
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a number or text that is a default to the help, unless the help ends with it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help or ""
        is_shown = isinstance(default, int | float | str) and not isinstance(default, bool)
        if not is_shown or default == "" or text.endswith(")"):
            return text
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, and names the closest flag."""

    def __init__(self, bare_word_flag: str = "", **kwargs: Any) -> None:
        """Make a parser; arguments as argparse's, and the flag that a bare word may have meant."""
        self._bare_word_flag = bare_word_flag
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs["description"] = as_started(kwargs.get("description", ""))
        super().__init__(allow_abbrev=False, conflict_handler="resolve", **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1:2 is a value, not a flag
        # `run` handles it; here it is for --help.
        debug_help = "show the traceback of an error"
        self.add_argument(
            "--debug", action="store_true", help=debug_help, default=argparse.SUPPRESS
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the parsed flags and the other words, which `read_config` takes.

        Raises:
          UsageError: for a misspelt flag among those other words.
        """
        known, unknown = super().parse_known_args(args, namespace)
        bare = next((word for word in unknown[:1] if not word.startswith("-")), "")
        if bare and self._bare_word_flag and not bare.endswith(".py"):
            meant = shlex.join([self._bare_word_flag, bare])
            raise UsageError(f"{bare!r} is not understood; did you mean {meant}?")
        for word in unknown:
            if hint := self._similar_flag(word):
                raise UsageError(f"{word!r} is not understood{hint}")
        return known, unknown

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UsageError(f"{unknown[0]!r} is not understood; see --help")
        return known

    def _similar_flag(self, word: str) -> str:
        """Return the clause that names the flag most similar to a word, or an empty string."""
        if not word.startswith("-") or CONFIG_FLAG.fullmatch(word):
            return ""
        flags = {flag.strip("-"): flag for each in self._actions for flag in each.option_strings}
        name = word.split("=")[0].strip("-")
        close = difflib.get_close_matches(name, flags, n=1, cutoff=SIMILAR)
        meant = FLAG_ALIASES.get(name, "")
        if meant not in flags.values():
            meant = flags[close[0]] if close else ""
        return f"; did you mean {meant!r}?" if meant else ""
