"""Which process this is and where the others are, as a user tells it by hand."""

import atexit
import collections
import contextlib
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from llama_jax.distributed.consistency import require_same
from llama_jax.errors import UsageError, UserError, finite_number, whole_number

BY_HAND = "--coordinator HOST:PORT --num_processes N --process_id I"


def membership(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any]:
    """What to tell JAX; nothing if none of the three is given.

    Raises:
      UsageError: when one of them is missing or out of range.
      UserError: when this is process 0 and the port is taken.
    """
    if coordinator is None and num_processes is None and process_id is None:
        return {}
    if coordinator is None or num_processes is None or process_id is None:
        raise UsageError(f"{BY_HAND} go together; give all three of them, or none")
    port = _port(coordinator)
    count = whole_number("--num_processes", num_processes, lambda n: n > 0, "1 or more")
    number = whole_number(
        "--process_id", process_id, lambda n: 0 <= n < count, f"0 to {count - 1}, or more processes"
    )
    if number == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _require_free(port)
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _port(address: str) -> int:
    """The port of an address such as "10.0.0.1:1234" or "[::1]:1234"."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):([0-9]{1,9})", address)
    if not match:
        raise UsageError(
            f"--coordinator={address!r} is not understood; expected HOST:PORT, such as"
            " 10.0.0.1:1234"
        )
    port = int(match[2])
    if not 0 < port < 2**16:
        raise UsageError(
            f"the port of --coordinator={address} is out of range; expected 1 to 65535"
        )
    return port


def _require_free(port: int) -> None:
    """Refuse a port that another program listens at; JAX would crash."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        raise UserError(
            f"port {port} of this machine cannot be used ({error.strerror}); choose another one"
            " in --coordinator"
        ) from error


# Several processes, on one machine or many, joined into one run by JAX's distributed runtime.
#
# Who the processes are is told by the environment (Slurm, Open MPI, GKE, Cloud TPU) or by hand.
# Does not know what they compute.

TIMEOUT = 300.0  # seconds; machines of one job do not all start at once
FAREWELL = 10.0  # seconds that a process which failed waits for the others to fail as well
LOST = re.compile(r"gloo|connection (closed|reset)|heartbeat|unhealthy", re.IGNORECASE)


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[None]:
    """Inside the block, this process is one of several that compute together.

    Call it before anything is computed. The three first arguments go together; without them the
    environment tells.

    Args:
      coordinator: HOST:PORT of process 0, at which the others find it.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.
      timeout: seconds until all must have come, and for which one may be silent later.

    Raises:
      UsageError: for arguments that cannot be, or when neither they nor the environment tell.
      UserError: when the others do not come in time, have other numbers of devices, were told
        another number of processes, or leave.
    """
    timeout = finite_number("--timeout", timeout, lambda seconds: seconds > 0, "seconds above 0")
    arguments = membership(coordinator, num_processes, process_id)
    try:
        _connect(arguments, timeout)
    except BaseException as error:
        _leave_at_exit(error)
        raise
    try:
        _require_equal_devices()
        _require_equal_counts()
        yield
    except BaseException as error:
        _part()
        _leave_at_exit(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            raise UserError(
                "another process has ended; look for the first error in the others' logs, then"
                " start all of them again: they go on from the last checkpoint"
            ) from error
        raise
    with contextlib.suppress(RuntimeError):  # whoever is gone by now has ended well or has told
        jax.distributed.shutdown()


def require_joined() -> None:
    """Refuse to be one of several processes that know nothing of each other.

    Raises:
      UsageError: on a machine of a TPU slice of several, when `joined` was not asked for.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError(f"this is one of {jax.process_count()} processes; add --distributed")


def _connect(arguments: dict[str, Any], timeout: float) -> None:
    """Meet the other processes.

    JAX ends the process with a stack trace when its own timeout is over, so that is set longer and
    the waiting is done here.
    """
    failures: list[BaseException] = []

    def connect() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of environments that tell half of it
                jax.distributed.initialize(
                    **arguments,
                    initialization_timeout=round(timeout) + 3600,
                    heartbeat_timeout_seconds=max(1, round(timeout)),
                )
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise UserError(_absence(timeout))
    if failures:
        raise _complaint(failures[0])


def _absence(timeout: float) -> str:
    """Who did not come."""
    from jax._src.distributed import global_state  # what an environment told has no public name

    address = global_state.coordinator_address or "that the environment names"
    if global_state.service is not None:
        return (
            f"not all {global_state.num_processes} processes came to the coordinator at {address}"
            f" within {timeout:g} s; see that all are started and can reach it, or give a longer"
            " --timeout"
        )
    return (
        f"the coordinator at {address} did not let this process in within {timeout:g} s; see that"
        " process 0 runs there and its port can be reached, that --num_processes is the same"
        " everywhere and --process_id nowhere, or give a longer --timeout"
    )


def _complaint(failure: BaseException) -> BaseException:
    """Why JAX could not be started, in a line."""
    if isinstance(failure, ValueError) and "should be defined" in str(failure):
        return UsageError(f"no Slurm, Open MPI, GKE or Cloud TPU job runs here; add {BY_HAND}")
    if isinstance(failure, RuntimeError | OSError | LookupError | ValueError):
        first = (str(failure).splitlines() or [repr(failure)])[0]
        return UserError(f"the processes could not be joined: {first}; or add {BY_HAND}")
    return failure


def _require_equal_devices() -> None:
    """Refuse processes with different numbers of devices: data could not be shared out."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    for number in range(jax.process_count()):
        if counts[number] != counts[0]:
            raise UserError(
                f"process {number} has {counts[number]} devices and process 0 has {counts[0]};"
                " give every process equally many"
            )


def _require_equal_counts() -> None:
    """Refuse processes that expect other numbers of processes; JAX only asks process 0."""
    from jax._src.distributed import global_state

    require_same({"--num_processes": global_state.num_processes})


def _part() -> None:
    """Leave the others, who may have failed as well or may wait for this process for ever."""

    def say_goodbye() -> None:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()

    thread = threading.Thread(target=say_goodbye, daemon=True)
    thread.start()
    thread.join(FAREWELL)


def _leave_at_exit(error: BaseException) -> None:
    """End with this error's exit code, before JAX waits for the others again."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    atexit.register(_leave, code)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
