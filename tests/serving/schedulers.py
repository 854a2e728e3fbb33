"""A scheduler for the tests of a file, and waiting for what its thread does."""

import contextlib
import time

from llama_jax.serving.scheduler import Scheduler


@contextlib.contextmanager
def started(engine, **options):
    """Yield a scheduler that serves, and close it."""
    scheduler = Scheduler(engine, **options)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.close()


def wait_until(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)
