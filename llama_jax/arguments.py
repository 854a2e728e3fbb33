"""Numbers that a user gives: of the right kind and in range, or an error of one line.

Does not know which arguments there are.
"""

import contextlib
import math
import numbers
from collections.abc import Callable
from typing import Any

from llama_jax.errors import UsageError

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
