"""Errors that a user can cause and fix, each reported in one line, and warnings.

The command line prints a `UserError` as that line and exits with its `exit_code`; any other
exception is a bug, reported as one. Messages follow one pattern: what is wrong with its
value, what was expected, what to do.
"""

import codecs
import contextlib
import difflib
import errno
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def shipped_folder(name: str) -> Path:
    """Return configs/ or docs/: at the top of a clone, or in an installed package."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


SCRIPT = re.compile(  # but llama2.c's train.py
    r"(?<!'s )(?<![\w./-])(?:python )?"
    r"(train|sample|serve|evaluate|prepare|convert|convert_meta|plan)\.py\b"
)


def as_started(text: str) -> str:
    """Return a text with commands as this process was started.

    `sample.py` and `python sample.py` become `llama-jax sample` where that command is running.
    """
    if not sys.argv[0].startswith("llama-jax "):
        return text
    return SCRIPT.sub(lambda found: f"llama-jax {found[1].replace('_', '-')}", text)


class UserError(ValueError):
    """A mistake in data, files or the arguments of a function, in one printable line.

    Its `page` of docs/, such as "pods.md#start", is named at the end.
    """

    exit_code = 1

    def __init__(self, message: object, *, page: str = "") -> None:
        # Names and values in a message may come from a damaged file.
        more = f"; see {_path_of(page)}" if page else ""
        super().__init__(format_line(as_started(f"{message}{more}")))


def _path_of(page: str) -> str:
    """Return the path of a page: in an installed package all of it, in a clone from its top."""
    folder = shipped_folder("docs")
    is_installed = folder.parent == Path(__file__).resolve().parent
    return str(folder / page) if is_installed else f"docs/{page}"


class UsageError(UserError):
    """A mistake on the command line or in a config file."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """Training met a loss or gradient that is NaN or infinite, and stopped before using it."""

    exit_code = 3


class OutOfMemoryError(UserError):
    """A device does not have enough memory for a program or its data."""


def warn(text: str) -> None:
    """Print a warning line on stderr, on process 0 only."""
    import jax

    if jax.process_index() == 0:
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
            print(f"warning: {format_line(text)}", file=sys.stderr, flush=True)


CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # but tab, newline and return
MAX_LINE = 1000  # characters of a message


def escape_controls(text: str) -> str:
    """Return a text with control characters, which a terminal may obey, as `\\x1b`."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def format_line(text: str) -> str:
    """Return a message as one printable line, without the middle of one that is very long."""
    line = " ".join(escape_controls(text).split())
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} … {line[-MAX_LINE // 2 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, cut at 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


# Whose words are looked for in the middle of longer messages of Orbax and TensorStore.
SYSTEM_ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM]
SYSTEM_ERRORS += [errno.EMFILE, errno.EIO]


def reason(error: BaseException) -> str:
    """Return why an operation failed, in one line: the system's words if it was the system."""
    known = (os.strerror(code) for code in SYSTEM_ERRORS)
    return next((words for words in known if words in str(error)), "") or first_line(error)


def write_error(path: object, error: BaseException) -> UserError:
    """Return the error for a file or folder that cannot be written."""
    return UserError(
        f"cannot write to {path}: {reason(error)}; free some space or choose another place"
    )


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.65) -> str:
    """Return "; did you mean 'x'?" for the choice closest to `name`, or an empty string.

    Args:
      cutoff: the lowest similarity that counts, from 0 to 1, as in `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- numbers in arguments ----

MAX_SHOWN = 60  # characters of a value in a message


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless the condition holds."""
    if not condition:
        raise UsageError(message)


def finite_number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float:
    """Return an argument as a float.

    Args:
      name: of the argument, for the message.
      accepts: whether a finite number is in range.
      expected: the range in words, for the message.

    Raises:
      UsageError: unless the value is a finite real number in range.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UsageError(f"{name}={shown(value)} is not a number; expected {expected}")
    number = math.nan
    with contextlib.suppress(OverflowError):  # an int too large for a float
        number = float(value)
    if not (math.isfinite(number) and accepts(number)):
        raise UsageError(f"{name}={shown(value)} is out of range; expected {expected}")
    return number


def whole_number(name: str, value: Any, accepts: Callable[[int], bool], expected: str) -> int:
    """Return an argument as an int; arguments and errors as for `finite_number`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UsageError(f"{name}={shown(value)} is not an integer; expected {expected}")
    if not accepts(value):  # type: ignore[arg-type]
        raise UsageError(f"{name}={shown(value)} is out of range; expected {expected}")
    return int(value)


def shown(value: Any) -> str:
    """Format a value as the user may have typed it, shortened to fit in a line."""
    try:
        text = str(value) if isinstance(value, numbers.Real) else repr(value)
    except ValueError:  # Python formats integers of up to 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


# ---- files of an unexpected type ----

SIGNATURES = {  # in lower case
    b"version https://git-lfs": "only a git-LFS pointer; run `git lfs pull` there",
    b"pk\x03\x04": "a zip archive, as PyTorch's files are",
    b"gguf": "a GGUF file",
}
WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")  # a bare "<" could be the number 60


def describe_file(head: bytes) -> str:
    """Return what a file is by its first bytes, with advice; empty if they are not recognised."""
    if not head:
        return "empty; copy it again"
    start = head.lstrip().lower()
    if start.startswith(WEB_PAGE):
        return "a web page; download the file itself"
    return next((what for known, what in SIGNATURES.items() if start.startswith(known)), "")


def is_utf16(head: bytes) -> bool:
    """Return whether a text file starts with a byte order mark of UTF-16."""
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


# ---- XLA's out-of-memory errors, on CPU, GPU and TPU, while compiling and while running ----

GIB = 2**30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
SIZE = r"([\d.]+) ?([KMGT]?)(?:i?B| ?bytes)?\b"

# The last one is reported by a CPU program whose input could not be allocated.
OUT_OF_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|Resource exhausted|CUDA_ERROR_OUT_OF_MEMORY"
    "|INTERNAL: .*Out of memory allocating"
)
# More device memory would not help with these: disks, messages between processes, and the TPU's
# scratch memories that a kernel fills.
OTHER_RESOURCES = re.compile(
    r"No space left|message larger|memory space [vs]mem|on [VS]mem|Quota", re.IGNORECASE
)
PROGRAM_AND_LIMIT = (  # what a program needs and what the device has
    rf"Used {SIZE} of {SIZE} hbm",
    rf"total memory required[^(]*\({SIZE}\) exceeds available HBM \({SIZE}\)",
)
PROGRAM = (rf"total allocation: *{SIZE}",)  # what a program needs, on GPU
ALLOCATION = (  # one allocation that failed, the most precise pattern first
    rf"request for [^(]*\({SIZE}\)",
    rf"(?:trying to allocate|allocate|allocating|reserve) {SIZE}",
)
FREE = (rf"There are {SIZE} free", rf"{SIZE} available")
CAPACITY = (rf"capacity {SIZE}",)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host has no memory left."""
    if isinstance(error, UserError):
        return False
    text = str(error)
    is_from_xla = OUT_OF_MEMORY.search(text) and not OTHER_RESOURCES.search(text)
    return bool(is_from_xla) or isinstance(error, MemoryError)


def out_of_memory_message(error: BaseException, advice: str, limit: int = 0) -> str:
    """Return one line with the memory needed, the memory available, and advice.

    Args:
      error: one for which `is_out_of_memory` is true.
      advice: what the user can do.
      limit: bytes of the device's memory, for errors that do not say; 0: unknown.
    """
    text = " ".join(str(error).split())
    return f"out of memory: {_need(text, limit)}; {advice}"


def _need(text: str, limit: int) -> str:
    if both := _sizes(PROGRAM_AND_LIMIT, text):
        return f"the program needs {both[0]} and the device has {both[1]}"
    capacity = _sizes(CAPACITY, text) or ([_format_size(limit)] if limit else [])
    of_capacity = f" of {capacity[0]}" if capacity else ""
    if program := _sizes(PROGRAM, text):
        has = f" and the device has {capacity[0]}" if capacity else ""
        return f"the program needs {program[0]}{has}"
    allocation, free = _sizes(ALLOCATION, text), _sizes(FREE, text)
    if allocation and free:
        return f"{allocation[0]} more were needed and {free[0]}{of_capacity} are free"
    if allocation:
        beyond = f", beyond the limit{of_capacity}" if capacity else ""
        return f"{allocation[0]} more were needed{beyond}"
    return "the device's memory is full" + (f", all{of_capacity}" if capacity else "")


def _sizes(patterns: Sequence[str], text: str) -> list[str]:
    """Return the formatted sizes in the first pattern that matches, or an empty list."""
    for pattern in patterns:
        if match := re.search(pattern, text):
            groups = match.groups()
            pairs = zip(groups[::2], groups[1::2])
            return [_format_size(float(number) * UNITS[unit]) for number, unit in pairs]
    return []


def _format_size(size: float) -> str:
    """Format bytes as GiB, or as MiB below a tenth of one."""
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


@contextlib.contextmanager
def catch_out_of_memory(advice: str, limit: int = 0) -> Iterator[None]:
    """Raise `OutOfMemoryError` where the block runs out of memory.

    Arguments as for `out_of_memory_message`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(out_of_memory_message(error, advice, limit)) from error
