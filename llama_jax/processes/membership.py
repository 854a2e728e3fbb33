"""Which process this is and where the others are, as a user tells it by hand."""

import os
import re
import socket
from typing import Any

from llama_jax.arguments import whole_number
from llama_jax.errors import UsageError, UserError

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
