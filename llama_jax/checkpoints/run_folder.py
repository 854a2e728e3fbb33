"""A run's folder: which run it belongs to, and the lock that a process holds on it.

    config.json        written by `checkpoints.metadata`
    tokenizer.model    so that sampling needs nothing else
    metrics.jsonl      written by `training.metrics`
    profile/           written by `training.profiling`, with --profile
    <step>/            written by `checkpoints.save`

A converted model has such a folder too, with step 0 alone. A folder that holds one, another run or
anything else is refused: nothing in it is ever overwritten.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoints.layout import file_checksum, resolved
from llama_jax.checkpoints.metadata import CONFIG, Run, read_run, write_atomically, write_run
from llama_jax.config import Config
from llama_jax.distributed.consistency import gathered, together
from llama_jax.errors import UsageError, UserError

TOKENIZER, METRICS, LOCK = "tokenizer.model", "metrics.jsonl", ".lock"
MARK = LOCK + "-"  # begins the name of what is written for a moment to see who else sees it

# Settings that may change when a run is resumed. Those of the schedule change what the run learns
# from then on; the others change nothing but rounding.
SCHEDULE_KEYS = tuple(
    f"optimizer.{name}"
    for name in (
        "steps",
        "learning_rate",
        "min_learning_rate",
        "warmup_steps",
        "weight_decay",
        "clip_norm",
    )
)
FREE_SECTIONS = ("mesh", "run")
FREE_KEYS = (*SCHEDULE_KEYS, "data.path", "data.allow_change", "optimizer.accumulation_steps")
BOUND_KEYS = ("run.seed",)


def require_same_run(folder: Path, run: Run, tokenizer: Path) -> dict[str, tuple[Any, Any]]:
    """Refuse to resume another run, or one with another tokenizer.

    Returns:
      The settings of the optimizer and the mesh that have changed, as (old, new).

    Raises:
      UserError: naming what differs.
    """
    if not (folder / CONFIG).exists() or not _has_begun(folder):
        return {}
    changed = _require_same(folder, read_run(folder).config, run.config)
    ours = folder / TOKENIZER
    if ours.exists() and ours.read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"the data's tokenizer is not the one that {folder} was trained with; prepare the data"
            f" with --tokenizer {ours}, or choose another folder with --config.run.checkpoint_dir=…"
        )
    return changed


def describe(folder: Path, run: Run, tokenizer: Path) -> None:
    """Make a folder the run's own, once nothing stands against it; call it inside `claimed`."""
    write_run(folder, run)
    write_atomically(folder / TOKENIZER, tokenizer.read_bytes())


def require_tokenizer(folder: Path, meta: dict[str, Any]) -> None:
    """Raise `UserError` if the tokenizer file is not the one that a step was saved with.

    Args:
      meta: of the step; steps of earlier versions have no checksum of the tokenizer.
    """
    path, expected = folder / TOKENIZER, meta.get(TOKENIZER)
    if expected and path.is_file() and file_checksum(path) != expected:
        raise UserError(
            f"{path} is not the file that the checkpoint was saved with (its checksum differs);"
            " restore it from a copy, or from the folder of the data"
        )


def _has_begun(folder: Path) -> bool:
    """Whether a run has left more than its description: a start that was refused binds nobody."""
    metrics = folder / METRICS
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    return has_metrics or any(path.name[0].isdigit() for path in folder.iterdir())


def _require_same(folder: Path, old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Refuse a config whose run would not continue the old one; return what has changed."""
    was, now = settings(old), settings(new)
    for key, value in now.items():
        is_free = key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS
        if was[key] != value and (key in BOUND_KEYS or not is_free):
            raise UserError(
                f"{folder} holds another run: {key} is {was[key]!r} there and {value!r} here;"
                " choose another folder with --config.run.checkpoint_dir=…, or the same settings"
            )
    return {
        key: (was[key], value)
        for key, value in now.items()
        if was[key] != value and key.split(".")[0] in ("optimizer", "mesh")
    }


def settings(config: Config) -> dict[str, Any]:
    """A config's values by dotted name."""
    return _leaves(dataclasses.asdict(config))


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= (
            _leaves(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return leaves


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder, made if missing, for this process alone.

    Raises:
      UsageError: when it is a file, cannot be written, or has a name that arrays cannot be stored
        under.
      UserError: when another process trains in it, or it holds anything but a run.
    """
    resolved(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected a folder to write checkpoints in")
    if folder.exists() and not (folder / CONFIG).exists():
        _require_empty(folder)
    if (folder / CONFIG).exists():
        read_run(folder)  # a converted model is refused before anything is touched
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}); choose another folder with"
            " --config.run.checkpoint_dir=…"
        ) from error
    with lock:
        _lock(lock, folder)
        yield


def _require_empty(folder: Path) -> None:
    """Refuse a folder with anything but what we leave in it before it is a run's."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(MARK)}
    others = names - {LOCK, CONFIG + ".partial"}
    if others:
        raise UserError(
            f"{folder} is not empty and holds no run (it has {min(others)!r}); choose another"
            " folder with --config.run.checkpoint_dir=…"
        )


def _lock(lock: Any, folder: Path) -> None:
    """Take a lock that the operating system frees when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise UserError(f"{folder} is in use by {owner}; wait for it, or stop it") from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()}\n")
    lock.flush()


def require_space(folder: Path, needed: int, what: str = "a checkpoint") -> None:
    """Raise `UserError` if a folder's disk has fewer bytes free than a write needs."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist any more; {what} cannot be written there")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {_format_size(free)} free, and {what} takes {_format_size(needed)};"
            " make room and run the same command again"
        )


def _format_size(size: int) -> str:
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    scale, unit = next((pair for pair in units if size >= pair[0]), (1e3, "kB"))
    return f"{size / scale:,.1f} {unit}"


# A run's folder as all its processes see it: process 0 holds it, the others find it there.

PATIENCE = 10.0  # seconds that a network disk may take to show a new file


@contextlib.contextmanager
def claimed_by_all(folder: Path) -> Iterator[None]:
    """Hold a folder for this run: see `claimed`, of which process 0 takes care.

    Raises:
      UsageError, UserError: on every process, as `claimed` raises them; and when a process does
        not see what process 0 writes there.
    """
    with contextlib.ExitStack() as stack:
        with together():
            if jax.process_index() == 0:
                stack.enter_context(claimed(folder))
        if jax.process_count() > 1:
            _require_shared(folder)
        yield


def _require_shared(folder: Path) -> None:
    """Refuse a folder that lies on each machine's own disk."""
    (name, *_) = gathered(MARK + secrets.token_hex(8))
    mark = folder / name
    with together():
        if jax.process_index() == 0:
            mark.touch()
    try:
        with together():
            _wait_for(mark)
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def _wait_for(mark: Path) -> None:
    """Return once a file is there."""
    latest = time.monotonic() + PATIENCE
    while not mark.exists():
        if time.monotonic() > latest:
            raise UserError(
                f"on {socket.gethostname()}, {mark.parent} is not the folder that process 0 writes"
                " to; put --config.run.checkpoint_dir on a disk that all machines share"
            )
        time.sleep(0.1)
