"""Numbers that a user gives: of the right kind and in range, or an error of one line.

Does not know which arguments there are.
"""

import contextlib
import math
import numbers
from collections.abc import Callable
from typing import Any

from llama_jax.errors import UsageError


def finite_number(name: str, value: Any, accepts: Callable[[float], bool], expected: str) -> float:
    """The argument as a float.

    Raises:
      UsageError: naming argument and range, unless it is a finite number that `accepts` accepts.
    """
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            number = float(value)
    if not (math.isfinite(number) and accepts(number)):
        raise _out_of_range(name, value, expected)
    return number


def whole_number(name: str, value: Any, accepts: Callable[[int], bool], expected: str) -> int:
    """The argument as an int.

    Raises:
      UsageError: naming argument and range, unless it is a whole number that `accepts` accepts.
    """
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (is_number and accepts(value)):
        raise _out_of_range(name, value, expected)
    return int(value)


def _out_of_range(name: str, value: Any, expected: str) -> UsageError:
    shown = value if isinstance(value, numbers.Real) else repr(value)
    return UsageError(f"{name}={shown} is out of range; expected {expected}")
