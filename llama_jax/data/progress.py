"""How far a long task has come, on stderr: a bar for people, a line now and then for logs."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0


class Show(Protocol):
    """Takes the amount done so far, and a remark such as what is being done now."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(task: str, total: int, unit: str = "B") -> Iterator[Show]:
    """A function to call with the amount done so far, of `total` (0: unknown).

    Without a terminal nothing is written for a task that takes less than ten seconds.
    """
    if not sys.stderr.isatty():
        yield _lines(task, total)
        return
    from tqdm import tqdm

    with tqdm(desc=task, total=total or None, unit=unit, unit_scale=True, leave=False) as bar:

        def show(done: int, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield show


def _lines(task: str, total: int) -> Show:
    """A function that prints at most a line in ten seconds."""
    last = time.monotonic()

    def show(done: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            amount = f"{done / total:.0%}" if total else f"{done:,}"
            print(f"{task}: {amount}{f' ({note})' if note else ''}", file=sys.stderr, flush=True)

    return show
