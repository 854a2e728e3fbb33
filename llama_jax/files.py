"""A folder or file that appears whole or not at all, whatever happens while it is made.

Does not know what goes into it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from llama_jax.errors import UserError

LOCK = ".lock"  # held while a partial folder is being filled; the system frees it if we die


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside `path` to write in, which is renamed to `path` at the end.

    If the block fails, nothing of it stays. If the process is killed, the hidden folder stays and
    the next `new_folder` for the same path removes it.

    Raises:
      UserError: if `path` exists already or cannot be written; both are found before the block.
    """
    path = Path(path)
    with _hidden_folder(path) as partial:
        yield partial
        (partial / LOCK).unlink()
        _publish(partial, path)


@contextlib.contextmanager
def new_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden place for a file or folder to be made, which is renamed to `path` at the end.

    Nothing is at that place yet, and its name is that of `path`. Otherwise as `new_folder`.
    """
    path = Path(path)
    with _hidden_folder(path) as partial:
        yield partial / path.name
        _publish(partial / path.name, path)


@contextlib.contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """A locked hidden folder beside `path`, gone at the end unless it was renamed."""
    check_place(path)
    with contextlib.ExitStack() as stack:
        try:
            made = _make_parents(path.parent)
            stack.callback(_remove_empty, made)
            _remove_abandoned(path)
            partial = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
            partial.mkdir()
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            lock = stack.enter_context((partial / LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            reason = f"cannot write to {path}: {error.strerror}"
            raise UserError(f"{reason}; choose another place") from error
        yield partial


def _publish(made: Path, path: Path) -> None:
    """Bring what was made onto the disk, then give it its name."""
    for file in (*made.rglob("*"), made):
        _flush(file)
    check_place(path)
    made.rename(path)
    _flush(path.parent)


def check_place(path: Path) -> None:
    """`UserError` if nothing new can be made at `path`; nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already; remove it or choose another name")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "is not writable" if parent.is_dir() else "is not a folder"
        raise UserError(f"cannot write to {path}: {parent} {reason}; choose another place")


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it; the ones that were missing, lowest first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _remove_abandoned(path: Path) -> None:
    """Remove partial folders for `path` that no living process holds the lock of."""
    for partial in path.parent.glob(f".{path.name}.partial-*"):
        with contextlib.suppress(OSError):
            with (partial / LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a file or folder onto the disk, so that a power cut cannot empty it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# How far a long task has come, on stderr: a bar for people, a line now and then for logs.

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
