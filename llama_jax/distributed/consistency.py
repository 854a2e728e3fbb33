"""What the processes of a run tell each other: texts, whether a part went well, what they hold.

Every process must call these functions equally often and in the same order. With one process
nothing is exchanged. Does not know what the texts mean.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llama_jax.errors import UsageError, UserError


def gathered(text: str) -> list[str]:
    """The text of each process, by the process's number."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    ours = np.frombuffer(text.encode(), np.uint8)
    lengths = process_allgather(np.int32(len(ours))).tolist()
    padded = np.zeros(max(1, *lengths), np.uint8)
    padded[: len(ours)] = ours
    rows = process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that fails on every process if it fails on one.

    Nothing in it may wait for another process: one that has failed never comes.

    Raises:
      UserError: with the line of the first process that failed; there, the error itself.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    told = gathered(_told(failure))
    if failure is not None:
        raise failure
    for index, (code, _, line) in enumerate(words.partition(" ") for words in told):
        if line:
            kind = UsageError if code == str(UsageError.exit_code) else UserError
            raise kind(f"process {index}: {line}")


def _told(failure: Exception | None) -> str:
    """A failure as its exit code and its line; no failure as an empty text."""
    if failure is None:
        return ""
    line = str(failure) if isinstance(failure, UserError) else repr(failure)
    return f"{getattr(failure, 'exit_code', 1)} {line}"


def require_same(facts: Mapping[str, Any]) -> None:
    """Refuse to go on unless every process holds what process 0 holds.

    Args:
      facts: by name, what JSON can express.

    Raises:
      UserError: on every process, naming the first that differs, the fact and both values.
    """
    told = [json.loads(text) for text in gathered(json.dumps(facts, sort_keys=True))]
    for index, theirs in enumerate(told):
        for name, value in told[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"process {index} has {name}={theirs.get(name)!r} and process 0 has"
                    f" {name}={value!r}; start all processes with the same command, files and"
                    " versions"
                )
