"""Exchanges between the processes of a run: texts, failures, and values that have to be equal.

All processes have to call these functions equally often and in the same order. With one process
nothing is sent.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llama_jax.errors import UsageError, UserError


def gathered(text: str) -> list[str]:
    """Return the texts of all processes, in the order of their numbers."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = process_allgather(np.int32(len(data))).tolist()
    padded = np.zeros(max(1, *lengths), np.uint8)
    padded[: len(data)] = data
    rows = process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make a block fail on all processes if it fails on one.

    The block must not wait for another process, which may have failed.

    Raises:
      UserError: with the message of the first process that failed; on a process that failed, its
        own error.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    report = ""  # exit code and message
    if failure is not None:
        line = str(failure) if isinstance(failure, UserError) else repr(failure)
        report = f"{getattr(failure, 'exit_code', 1)} {line}"
    reports = gathered(report)
    if failure is not None:
        raise failure
    for index, (code, _, line) in enumerate(report.partition(" ") for report in reports):
        if line:
            kind = UsageError if code == str(UsageError.exit_code) else UserError
            raise kind(f"process {index}: {line}")


def require_same(values: Mapping[str, Any]) -> None:
    """Check that all processes have the same values.

    Args:
      values: JSON values by name.

    Raises:
      UserError: on every process, with the first process that differs, the name and both values.
    """
    received = [json.loads(text) for text in gathered(json.dumps(values, sort_keys=True))]
    for index, theirs in enumerate(received):
        for name, value in received[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"process {index} has {name}={theirs.get(name)!r} and process 0 has"
                    f" {name}={value!r}; start all processes with the same command, files and"
                    " versions"
                )
