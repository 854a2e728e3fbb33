"""Mistakes that a user can cause and mend, told in one line.

A door (see `cli`) prints such an error as that line and exits with its `exit_code`. Any other
exception is a fault of ours and keeps its traceback. Messages follow one pattern: what is wrong,
with its value; what was expected; what to do.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave us: data, files, arguments of a function."""

    exit_code = 1


class UsageError(UserError):
    """A mistake on the command line or in a config file."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """Training met a loss or gradient that is NaN or infinite, and stopped before using it."""

    exit_code = 3


def nearest(name: str, choices: Iterable[str], alike: float = 0.5) -> str:
    """The clause "; did you mean 'x'?" for the choice nearest to `name`, or an empty string.

    Args:
      alike: how much of the two must be the same, from 0 to 1.
    """
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=alike)
    return f"; did you mean {close[0]!r}?" if close else ""
