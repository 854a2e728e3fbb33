"""Mistakes that a user can cause and mend, told in one line.

A door (see `cli`) prints such an error as that line and exits with its `exit_code`. Any other
exception is a fault of ours and keeps its traceback. Messages follow one pattern: what is wrong,
with its value; what was expected; what to do.
"""

import contextlib
import difflib
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave us: data, files, arguments of a function."""

    exit_code = 1


class UsageError(UserError):
    """A mistake on the command line or in a config file."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """Training met a loss or gradient that is NaN or infinite, and stopped before using it."""

    exit_code = 3


def warn(text: str) -> None:
    """Print a warning line on stderr, on process 0 only."""
    import jax

    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def nearest(name: str, choices: Iterable[str], alike: float = 0.5) -> str:
    """The clause "; did you mean 'x'?" for the choice nearest to `name`, or an empty string.

    Args:
      alike: how much of the two must be the same, from 0 to 1.
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=alike)
    return f"; did you mean {close[0]!r}?" if close else ""


# Numbers that a user gives: of the right kind and in range, or an error of one line.
#
# Does not know which arguments there are.

LONGEST = 60  # characters of a value that are shown


def finite_number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float:
    """The argument as a float.

    Raises:
      UsageError: naming argument and range, unless it is a finite number that `accepts` accepts.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UsageError(f"{name}={_shown(value)} is no number; expected {expected}")
    number = math.nan
    with contextlib.suppress(OverflowError):  # an int beyond all floats
        number = float(value)
    if not (math.isfinite(number) and accepts(number)):
        raise UsageError(f"{name}={_shown(value)} is out of range; expected {expected}")
    return number


def whole_number(name: str, value: Any, accepts: Callable[[int], bool], expected: str) -> int:
    """The argument as an int.

    Raises:
      UsageError: naming argument and range, unless it is a whole number that `accepts` accepts.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UsageError(f"{name}={_shown(value)} is no whole number; expected {expected}")
    if not accepts(value):  # type: ignore[arg-type]
        raise UsageError(f"{name}={_shown(value)} is out of range; expected {expected}")
    return int(value)


def _shown(value: Any) -> str:
    """A value as the user may have typed it, of a length that a line has room for."""
    text = str(value) if isinstance(value, numbers.Real) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


# Recognises files that lie where another was expected, by how they begin.
#
# Does not know what was expected.

REASONS = {
    b"version https://git-lfs": "only a git-LFS pointer; run `git lfs pull` there",
    b"pk\x03\x04": "a zip archive, as PyTorch's files are",
    b"gguf": "a GGUF file",
}
WEB = (b"<!doctype", b"<html", b"<head", b"<?xml")  # "<" alone may as well be the number 60


def stand_in(head: bytes) -> str:
    """What a file that begins so is instead, with advice; empty for one that is not recognised."""
    if not head:
        return "empty; copy it again"
    start = head.lstrip().lower()
    if start.startswith(WEB):
        return "a web page; download the file itself"
    return next((why for known, why in REASONS.items() if start.startswith(known)), "")


# A device's "out of memory" in one line: the need, the limit, and what to turn.
#
# Reads what XLA says on CPU, GPU and TPU, when compiling and when running. Does not know the
# program
# that did not fit: its knobs are told by whoever ran it.

GIB = 2**30
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
SIZE = r"([\d.]+) ?([KMGT]?)(?:i?B| ?bytes)?\b"

# The last is of a program on CPU that waited for the results of one whose memory could not be had.
SIGNS = re.compile(
    "RESOURCE_EXHAUSTED|Resource exhausted|CUDA_ERROR_OUT_OF_MEMORY"
    "|INTERNAL: .*Out of memory allocating"
)
# The same words for what more device memory would not help: a disk, a message between processes,
# the TPU's scratch memories that a kernel fills.
OTHERS = re.compile(
    r"No space left|message larger|memory space [vs]mem|on [VS]mem|Quota", re.IGNORECASE
)
# What a whole program needs of how much there is.
WHOLE = (
    rf"Used {SIZE} of {SIZE} hbm",
    rf"total memory required[^(]*\({SIZE}\) exceeds available HBM \({SIZE}\)",
)
TOTAL = (rf"total allocation: *{SIZE}",)  # a whole program's, on GPU
# One piece of memory that could not be had, the most telling spelling first.
PIECE = (
    rf"request for [^(]*\({SIZE}\)",
    rf"(?:trying to allocate|allocate|allocating|reserve) {SIZE}",
)
FREE = (rf"There are {SIZE} free", rf"{SIZE} available")
CAPACITY = (rf"capacity {SIZE}",)


class OutOfMemoryError(UserError):
    """A device's memory does not hold what was asked of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, UserError):
        return False
    text = str(error)
    is_told = SIGNS.search(text) and not OTHERS.search(text)
    return bool(is_told) or isinstance(error, MemoryError)


def explanation(error: BaseException, advice: str, limit: int = 0) -> str:
    """The line for an error that `is_out_of_memory`.

    Args:
      advice: what the user can do.
      limit: bytes of the device's memory, where the error does not tell; 0: not known.
    """
    text = " ".join(str(error).split())
    return f"out of memory: {_need(text, limit)}; {advice}"


def _need(text: str, limit: int) -> str:
    """What was needed and what there is, as far as the text tells."""
    whole = _sizes(WHOLE, text)
    if whole:
        return f"the program needs {whole[0]} and the device has {whole[1]}"
    capacity = _sizes(CAPACITY, text) or ([_spelled(limit)] if limit else [])
    has = f" of {capacity[0]}" if capacity else ""
    if total := _sizes(TOTAL, text):
        limits = f" and the device has {capacity[0]}" if capacity else ""
        return f"the program needs {total[0]}{limits}"
    piece, free = _sizes(PIECE, text), _sizes(FREE, text)
    if piece and free:
        return f"{piece[0]} more were needed and {free[0]}{has} are free"
    if piece:
        return f"{piece[0]} more were needed" + (f", beyond the limit{has}" if has else "")
    return "the device's memory is full" + (f", all{has}" if has else "")


def _sizes(patterns: Sequence[str], text: str) -> list[str]:
    """The sizes that the first pattern found in a text holds, spelled alike."""
    for pattern in patterns:
        if match := re.search(pattern, text):
            groups = match.groups()
            pairs = zip(groups[::2], groups[1::2])
            return [_spelled(float(number) * UNITS[unit]) for number, unit in pairs]
    return []


def _spelled(size: float) -> str:
    """Bytes as GiB, or MiB where that is less than a tenth of one."""
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


@contextlib.contextmanager
def explained(advice: str, limit: int = 0) -> Iterator[None]:
    """Inside the block, memory running out is an `OutOfMemoryError`; see `explanation`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explanation(error, advice, limit)) from error
