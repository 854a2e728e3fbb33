"""A run's folder as all its processes see it: process 0 holds it, the others find it there."""

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from llama_jax.checkpoints.run_folder import MARK, claimed
from llama_jax.errors import UserError
from llama_jax.processes.agreement import gathered, together

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
