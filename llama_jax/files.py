"""Atomic creation of files and folders, and progress on stderr.

A file or folder is written under a hidden name and renamed when it is complete, so that a crash
never leaves a partial one under its final name.
"""

import contextlib
import errno
import glob
import itertools
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from llama_jax.errors import SYSTEM_ERRORS, UserError, write_error

CACHE_VARIABLE = "LLAMA_JAX_CACHE"
LOCK = ".lock"  # locked while a partial folder is written; the system releases it if we die
SECONDS_BETWEEN_LINES = 10.0  # of progress, in a log
SECONDS_BETWEEN_WAITS = 30.0  # lines of a time, in a log
SECONDS_BETWEEN_TICKS = 1.0  # of a time that is shown

Item = TypeVar("Item")


def cache_folder() -> Path:
    """Return the folder of downloads and compiled programs.

    It is `$LLAMA_JAX_CACHE`, or llama_jax in `$XDG_CACHE_HOME`, by default in ~/.cache.

    Raises:
      UserError: without a home directory.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    try:
        default = Path.home() / ".cache"
    except RuntimeError as error:
        message = f"there is no home directory; set {CACHE_VARIABLE} to a folder"
        raise UserError(message) from error
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "llama_jax"


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder, which is renamed to `path` at the end; otherwise as `new_path`."""
    with new_path(path) as folder:
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def new_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path in a hidden folder, with the name of `path`, to create a file or folder at.

    What is created there is renamed to `path` at the end. If the block fails, it is removed. If the
    process is killed, the next `new_path` for the same path removes it.

    Raises:
      UserError: if `path` exists already or cannot be written, checked before the block runs; and
        where the system refuses what the block writes.
    """
    path = Path(path)
    with _hidden_folder(path) as partial:
        yield partial / path.name
        _publish(partial / path.name, path)


@contextlib.contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """Yield a locked hidden folder beside `path`, removed at the end unless it was renamed."""
    check_new_path(path)
    with contextlib.ExitStack() as stack:
        try:
            made = _make_parents(path.parent)
            stack.callback(_remove_empty, made)
            _remove_abandoned(path)
            while not (partial := _new_partial(path, stack)):
                pass
        except OSError as error:
            raise write_error(path, error) from error
        try:
            yield partial
        except OSError as error:
            is_here = not error.filename or Path(error.filename).is_relative_to(partial)
            if is_here and error.errno in SYSTEM_ERRORS:
                raise write_error(path, error) from error
            raise  # another file, which is read, or a broken connection


def _publish(made: Path, path: Path) -> None:
    """Flush what was made to disk, then give it the name `path`."""
    for file in (*made.rglob("*"), made):
        _flush(file)
    check_new_path(path)
    try:
        if made.is_dir():
            made.rename(path)  # which replaces no folder that holds anything
        else:
            path.hardlink_to(made)  # which, unlike renaming, replaces no file
    except OSError:
        check_new_path(path)  # another process may have published at the same moment
        if made.is_dir():
            raise
        made.rename(path)  # the file system has no links
    _flush(path.parent)


def check_new_path(path: Path) -> None:
    """Raise `UserError` if `path` exists or cannot be created; nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        _remove_abandoned(path)  # of a process that was killed just after it published
        raise UserError(f"{path} exists already; remove it or choose another name")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "is not writable" if parent.is_dir() else "is not a folder"
        raise UserError(f"cannot write to {path}: {parent} {reason}; choose another place")


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that were missing, deepest first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _new_partial(path: Path, stack: contextlib.ExitStack) -> Path | None:
    """Return a new locked partial folder; None if another process took it for an abandoned one."""
    partial = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    stack.callback(shutil.rmtree, partial, ignore_errors=True)
    try:
        file = stack.enter_context((partial / LOCK).open("w"))
    except FileNotFoundError:
        return None
    try:
        lock(file)
    except BlockingIOError:
        return None
    except OSError:  # without locks, no process removes partial folders
        return partial
    return partial if (partial / LOCK).exists() else None


def _remove_abandoned(path: Path) -> None:
    """Remove partial folders for `path` whose lock no living process holds."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        with contextlib.suppress(OSError), (partial / LOCK).open("a") as file:
            lock(file)  # held until all is removed: see `_new_partial`
            shutil.rmtree(partial, ignore_errors=True)


def lock(file: TextIO) -> None:
    """Lock an open file until it is closed or this process ends, however it ends.

    Raises:
      BlockingIOError: if another process holds the lock.
      OSError: if the system (Windows) or the file system (as some of Lustre and NFS) has no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(errno.ENOTSUP, "no file locks on this system") from error
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(path: Path) -> None:
    """Flush a file or folder to disk, so that a power cut cannot empty it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShowProgress(Protocol):
    """A callback that takes the amount done so far and an optional note."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(task: str, total: int = 0, unit: str = "B") -> Iterator[ShowProgress]:
    """Yield a callback that reports progress on stderr: a bar on a terminal, else lines.

    Where the callback is not called, the time that has passed is shown. A task of unknown amount
    shows nothing on a terminal in its first second. Lines are at least ten seconds apart, those of
    a time thirty, so that a short task writes nothing to a log.

    Args:
      task: what is shown.
      total: the amount at the end, in `unit`; 0: unknown.
    """
    if not sys.stderr.isatty():
        lines = _Lines(task, total)
        with repeated(lines.print_if_due, SECONDS_BETWEEN_TICKS):
            yield lines.show
        return
    from tqdm import tqdm

    options: dict[str, Any] = (
        {"delay": 0.0} if total else {"delay": 1.0, "bar_format": "{desc}: {elapsed}"}
    )
    with tqdm(
        desc=task, total=total or None, unit=unit, unit_scale=True, leave=False, **options
    ) as bar:

        def show(done: int, note: str = "") -> None:
            bar.bar_format = None
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        def tick() -> None:
            bar.delay = 0.0  # else closing the bar would leave what is shown here
            bar.refresh()

        with repeated(tick, SECONDS_BETWEEN_TICKS):
            yield show


@contextlib.contextmanager
def repeated(call: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds while the block runs, from another thread."""
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(seconds):
            with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
                call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class _Lines:
    """The lines of a task in a log."""

    def __init__(self, task: str, total: int) -> None:
        self._task, self._total, self._state = task, total, ""
        self._started = self._printed = time.monotonic()

    def show(self, done: int, note: str = "") -> None:
        amount = f"{done / self._total:.0%}" if self._total else f"{done:,}"
        self._state = f"{amount}{f' ({note})' if note else ''}"
        self.print_if_due()

    def print_if_due(self) -> None:
        now = time.monotonic()
        least = SECONDS_BETWEEN_LINES if self._state else SECONDS_BETWEEN_WAITS
        if now - self._printed >= least:
            self._printed = now
            state = self._state or f"{now - self._started:.0f} s"
            print(f"{self._task}: {state}", file=sys.stderr, flush=True)


def first_with_progress(task: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield items, showing the time that passes until the first."""
    iterator = iter(items)
    with progress(task):
        first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator
