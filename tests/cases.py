"""Cases of parametrized tests of which some are left to `make test-slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases, all but the `quick` ones marked `slow`; a tuple is several arguments."""
    return [case if case in quick else slow(case) for case in cases]


def slow(case: Any) -> Any:
    """Return a case with the mark `slow`."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
