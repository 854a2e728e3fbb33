"""The folder of a run: which run it belongs to, and the lock that one process holds on it.

    config.json        written by `checkpoints.metadata`
    tokenizer.model    a copy, or tokenizer.json, so that sampling needs nothing else
    metrics.jsonl      written by `training.metrics`
    profile/           written by `training.profiling`, with --profile
    <step>/            written by `checkpoints.save`

A converted model has such a folder too, with step 0 alone. A run refuses a folder that holds one,
another run or anything else: nothing in it is ever overwritten.
"""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from llama_jax.checkpoints.layout import file_checksum, resolved
from llama_jax.checkpoints.metadata import CONFIG, Run, read_run, write_atomically, write_run
from llama_jax.config import Config
from llama_jax.distributed.consistency import gathered, together
from llama_jax.errors import UsageError, UserError, warn
from llama_jax.files import lock
from llama_jax.text.tokenizer import TOKENIZER_FILES, tokenizer_file_name, tokenizer_path

METRICS, LOCK = "metrics.jsonl", ".lock"
STEP_OR_PART = re.compile(r"\d+(\.|$)")  # a step, whole or not: 20, 20.orbax-checkpoint-tmp
MARK = LOCK + "-"  # prefix of a file that tests whether all processes see the folder
PATIENCE = 10.0  # seconds that a network disk may take to show a new file
OTHER_FOLDER = "choose another folder with --config.run.checkpoint_dir=…"

# Settings that may differ between two sessions of a run; any other makes it another run.
SCHEDULE = ("steps", "epochs", "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay")
FREE_SECTIONS = ("mesh", "run")
FREE_KEYS = {"data.path", "data.sources", "data.allow_change", "optimizer.accumulation_steps"}
FREE_KEYS |= {f"optimizer.{name}" for name in (*SCHEDULE, "clip_norm")}
BOUND_KEYS = ("run.seed",)
RECORDED_SECTIONS = ("mesh", "optimizer")  # whose changes are reported


# ---- which run ----


def require_same_run(folder: Path, run: Run, tokenizer: Path) -> dict[str, tuple[Any, Any]]:
    """Raise `UserError` if a folder holds another run, or one with another tokenizer.

    A run that made no step does not count.

    Returns:
      The settings of optimizer and mesh that have changed, by dotted name, as (old, new).
    """
    if not (folder / CONFIG).exists() or not _has_begun(folder):
        return {}
    old, new = settings(read_run(folder).config), settings(run.config)
    changed = {key: (old[key], value) for key, value in new.items() if old[key] != value}
    for key, (_, value) in changed.items():
        is_free = key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS
        if key in BOUND_KEYS or not is_free:
            raise UserError(
                f"{folder} holds another run: {key} is {old[key]!r} there and {value!r} here;"
                f" {OTHER_FOLDER}, or the same settings"
            )
    ours = tokenizer_path(folder)
    if ours.exists() and ours.read_bytes() != tokenizer.read_bytes():
        raise UserError(
            f"the data's tokenizer is not the one that {folder} was trained with; prepare the data"
            f" with --tokenizer {ours}, or {OTHER_FOLDER}"
        )
    return {key: pair for key, pair in changed.items() if key.split(".")[0] in RECORDED_SECTIONS}


def _has_begun(folder: Path) -> bool:
    metrics = folder / METRICS
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    return has_metrics or any(STEP_OR_PART.match(path.name) for path in folder.iterdir())


def settings(config: Config) -> dict[str, Any]:
    """Return a config's values by dotted name."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(leaves(dataclasses.asdict(config)))


def write_metadata(folder: Path, run: Run, tokenizer: Path) -> None:
    """Write a run's config and tokenizer into its folder, which this process has locked."""
    write_run(folder, run)
    content = tokenizer.read_bytes()
    name = tokenizer_file_name(content)
    for other in TOKENIZER_FILES:  # of a start that made no step
        if other != name:
            (folder / other).unlink(missing_ok=True)
    write_atomically(folder / name, content)


def require_tokenizer(folder: Path, meta: dict[str, Any]) -> None:
    """Raise `UserError` if the tokenizer file is not the one that a step was saved with.

    Args:
      meta: of the step; steps of earlier versions have no checksum of the tokenizer.
    """
    path = tokenizer_path(folder)
    expected = next((meta[name] for name in TOKENIZER_FILES if name in meta), "")
    if expected and path.is_file() and file_checksum(path) != expected:
        raise UserError(
            f"{path} is not the file that the checkpoint was saved with (its checksum differs);"
            " restore it from a copy, or from the folder of the data"
        )


# ---- the lock ----


@contextlib.contextmanager
def claimed_by_all(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold a folder for this run: process 0 as in `claimed`, the others must see it.

    Args:
      patience: seconds that the folder of process 0 may take to appear.

    Raises:
      UsageError, UserError: on every process, as `claimed` raises them; or when a process does not
        see what process 0 writes there.
    """
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with together():
            if is_first:
                stack.enter_context(claimed(folder))
        if jax.process_count() > 1:
            _require_shared(folder, is_first, patience)
        yield


def _require_shared(folder: Path, is_first: bool, patience: float) -> None:
    """Raise `UserError` if a folder is on each machine's own disk."""
    mark = folder / gathered(MARK + secrets.token_hex(8))[0]
    with together():
        if is_first:
            mark.touch()
    try:
        with together():
            latest = time.monotonic() + patience
            while not mark.exists():
                if time.monotonic() > latest:
                    raise UserError(
                        f"on {socket.gethostname()}, {folder} is not the folder that process 0"
                        " writes to; put --config.run.checkpoint_dir on a disk that all machines"
                        " share"
                    )
                time.sleep(0.1)
    finally:
        if is_first:
            mark.unlink(missing_ok=True)


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
    if (folder / CONFIG).exists():
        read_run(folder)  # a converted model is refused before anything is touched
    elif folder.exists():
        _require_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}); {OTHER_FOLDER}"
        ) from error
    with file:
        _hold(file, folder)
        yield


def _require_empty(folder: Path) -> None:
    """Raise `UserError` if a folder has other files than a killed start may have left.

    Folders of other runs and of models may lie in it, as `ckpt/15m` in `ckpt`.
    """
    paths = [path for path in folder.iterdir() if not path.name.startswith(MARK)]
    names = {path.name for path in paths if not _is_other_run(path)}
    others = names - {LOCK, CONFIG + ".partial"}
    if others:
        raise UserError(
            f"{folder} is not empty and holds no run (it has {min(others)!r}); {OTHER_FOLDER}"
        )


def _is_other_run(path: Path) -> bool:
    """Return whether a path is the folder of a run or a model, and no step of this one."""
    return (path / CONFIG).is_file() and not STEP_OR_PART.match(path.name)


def _hold(file: TextIO, folder: Path) -> None:
    """Lock the lock file of a run and write this process's number to it."""
    try:
        lock(file)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use by {owner}; wait for it, or stop it") from None
    except OSError as error:
        warn(f"{folder} cannot be locked ({error.strerror}); start no other run in it")
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()}\n")
    file.flush()


# ---- room on the disk ----


def require_space(folder: Path, needed: int, what: str = "a checkpoint") -> None:
    """Raise `UserError` if a folder's disk has fewer bytes free than a write needs."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist any more; {what} cannot be written there")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {format_size(free)} free, and {what} takes {format_size(needed)};"
            " make room and run the same command again"
        )


def format_size(size: int) -> str:
    """Format bytes with a unit, such as 1.5 MB."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    scale, unit = next((pair for pair in units if size >= pair[0]), (1e3, "kB"))
    return f"{size / scale:,.1f} {unit}"
