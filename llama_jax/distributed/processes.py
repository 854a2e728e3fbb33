"""Start and end of a run with several processes, by JAX's distributed runtime.

The processes find each other by the environment of Slurm, Open MPI, GKE or Cloud TPU, or by flags.
"""

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

FLAGS = "--coordinator HOST:PORT --num_processes N --process_id I"
TIMEOUT = 300.0  # seconds; the machines of a job do not all start at once
SHUTDOWN_TIMEOUT = 10.0  # seconds that a failed process waits for the others to fail as well
LOST = re.compile(r"gloo|connection (closed|reset)|heartbeat|unhealthy", re.IGNORECASE)


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[None]:
    """Connect this process with the others of a run while the block runs.

    Enter it before JAX computes anything. Give the first three arguments together, or none of them
    where the environment has them.

    Args:
      coordinator: HOST:PORT of process 0, at which the others reach it.
      num_processes: number of processes.
      process_id: number of this one, from 0.
      timeout: seconds until all must have connected, and that one may be silent later.

    Raises:
      UsageError: for arguments out of range, or none where the environment has none.
      UserError: if the others do not connect in time, have other numbers of devices, expect another
        number of processes, or are lost.
    """
    timeout = finite_number("--timeout", timeout, lambda seconds: seconds > 0, "seconds above 0")
    arguments = _initialize_arguments(coordinator, num_processes, process_id)
    try:
        _connect(arguments, timeout)
    except BaseException as error:
        _exit_with_code_of(error)
        raise
    try:
        _require_equal_devices()
        _require_equal_counts()
        yield
    except BaseException as error:
        _shut_down()
        _exit_with_code_of(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            raise UserError(
                "another process has ended; look for the first error in the others' logs, then"
                " start all of them again: they resume from the last checkpoint"
            ) from error
        raise
    with contextlib.suppress(RuntimeError):  # a process that failed has been reported above
        jax.distributed.shutdown()


def require_joined() -> None:
    """Raise `UsageError` for one of several processes outside of `joined`, as on a TPU slice."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError(f"this is one of {jax.process_count()} processes; add --distributed")


def _initialize_arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any]:
    """Return arguments for `jax.distributed.initialize`; none if the environment has them."""
    if coordinator is None and num_processes is None and process_id is None:
        return {}
    if coordinator is None or num_processes is None or process_id is None:
        raise UsageError(f"{FLAGS} belong together; expected all three of them, or none")
    port = _port(coordinator)
    count = whole_number("--num_processes", num_processes, lambda n: n > 0, "1 or more")
    number = whole_number(
        "--process_id",
        process_id,
        lambda n: 0 <= n < count,
        f"0 to {count - 1}, below --num_processes",
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
    """Return the port of an address such as "10.0.0.1:1234" or "[::1]:1234"."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):([0-9]{1,9})", address)
    if not match:
        raise UsageError(
            f"--coordinator={address!r} is not an address; expected HOST:PORT, such as"
            " 10.0.0.1:1234"
        )
    port = int(match[2])
    if not 0 < port < 2**16:
        raise UsageError(
            f"the port of --coordinator={address} is out of range; expected 1 to 65535"
        )
    return port


def _require_free(port: int) -> None:
    """Raise `UserError` for a port that another program uses, with which JAX would crash."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=is_dual).close()
    except OSError as error:
        raise UserError(
            f"port {port} of this machine cannot be used ({error.strerror}); choose another one"
            " in --coordinator"
        ) from error


def _connect(arguments: dict[str, Any], timeout: float) -> None:
    """Connect with the other processes.

    JAX ends the process with a stack trace when its own timeout is over, so that is longer and the
    waiting is done here.
    """
    failures: list[BaseException] = []

    def connect() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about incomplete environments
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
        raise UserError(_timeout_message(timeout))
    if failures:
        raise _connection_error(failures[0])


def _timeout_message(timeout: float) -> str:
    """Return what did not happen within the timeout, with advice."""
    from jax._src.distributed import global_state  # the address has no public name

    address = global_state.coordinator_address or "that the environment names"
    if global_state.service is not None:
        return (
            f"not all {global_state.num_processes} processes connected to the coordinator at"
            f" {address} within {timeout:g} s; check that all are started and can reach it, or set"
            " a longer --timeout"
        )
    return (
        f"the coordinator at {address} did not accept this process within {timeout:g} s; check that"
        " process 0 runs there and its port can be reached, and that all processes have the same"
        " --num_processes and each its own --process_id, or set a longer --timeout"
    )


def _connection_error(failure: BaseException) -> BaseException:
    """Return an exception of `jax.distributed.initialize` as an error of one line."""
    if isinstance(failure, ValueError) and "should be defined" in str(failure):
        return UsageError(
            f"this is not part of a Slurm, Open MPI, GKE or Cloud TPU job; add {FLAGS}"
        )
    if isinstance(failure, RuntimeError | OSError | LookupError | ValueError):
        first = (str(failure).splitlines() or [repr(failure)])[0]
        return UserError(f"the processes could not be connected: {first}; or add {FLAGS}")
    return failure


def _require_equal_devices() -> None:
    """Raise `UserError` for different numbers of devices, over which data could not be sharded."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    for number in range(jax.process_count()):
        if counts[number] != counts[0]:
            raise UserError(
                f"process {number} has {counts[number]} devices and process 0 has {counts[0]};"
                " give every process the same number"
            )


def _require_equal_counts() -> None:
    """Raise `UserError` for different numbers of processes; JAX only uses that of process 0."""
    from jax._src.distributed import global_state

    require_same({"--num_processes": global_state.num_processes})


def _shut_down() -> None:
    """Disconnect from the others, which may have failed as well or wait for this process."""

    def shut_down() -> None:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()

    thread = threading.Thread(target=shut_down, daemon=True)
    thread.start()
    thread.join(SHUTDOWN_TIMEOUT)


def _exit_with_code_of(error: BaseException) -> None:
    """End the process with the exit code of an error, before JAX waits for the others again."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
