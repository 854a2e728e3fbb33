"""The TPU compiler on a machine without a TPU, from the package libtpu."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.errors import UserError
from llama_jax.planning.targets import Target

# By default libtpu looks for a metadata server and other TPU hosts, and locks out other processes.
# None of it is needed, since nothing here touches a device.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# The compiler places what it can in a chip's vector memory, 128 MiB on v5e, v5p and v6e, and its
# statistics count only some of that. In large programs the difference is negligible; smaller ones
# than this are compiled with all arrays in device memory.
SMALL_PROGRAM = 16 * 128 * 2**20
ALL_IN_DEVICE_MEMORY = {"xla_msa_enable": False}
MAX_MESSAGE = 200  # characters of the compiler's error that are shown


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler reports about a program, for one device."""

    total: float  # peak bytes in use, arguments included
    fits: bool  # whether the program compiled
    text: str  # optimized HLO; "" if it does not fit


def is_installed() -> bool:
    """Return whether the TPU compiler is there."""
    return importlib.util.find_spec("libtpu") is not None


def target_mesh(config: MeshConfig, target: Target) -> Mesh:
    """Return a mesh of the devices of a TPU slice, to compile for.

    Raises:
      UserError: when libtpu is in use or refuses the slice.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    chip, _, shape = target.topology.partition(":")
    options: dict[str, Any] = {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology, **options
        ).devices
    except Exception as error:
        if "lockfile" in str(error):
            raise UserError(
                "another process uses the TPU compiler (it locks /tmp/libtpu_lockfile); wait for"
                " it to end, or add --fast for the estimate alone"
            ) from error
        raise UserError(f"libtpu refuses the slice {target.topology}: {error}") from error
    return make_mesh(config, list(devices))


def compile_program(lower: Callable[[], Any], estimate: float) -> Compiled:
    """Compile a program and return its statistics; one too large for the device is no error.

    Args:
      lower: returns the lowered program.
      estimate: bytes that it is expected to take.

    Raises:
      UserError: when the compiler fails for another reason than memory.
    """
    options: Any = ALL_IN_DEVICE_MEMORY if estimate < SMALL_PROGRAM else None
    try:
        program = lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        total = required_bytes(str(error))
        if total is None:
            message = str(error).strip().partition("\n")[0][:MAX_MESSAGE]
            raise UserError(
                f"the TPU compiler fails on this program: {message}; try another version of libtpu"
                " or --config.run.remat, or add --fast for the estimate alone"
            ) from error
        return Compiled(total, False, "")
    # The peak is what the compiler compares with the device's memory. Arguments plus temporaries
    # are more, since some temporaries reuse the memory of arguments.
    total = program.memory_analysis().peak_memory_in_bytes
    return Compiled(total, True, program.as_text())


def required_bytes(message: str) -> float | None:
    """Return the bytes in the compiler's out-of-memory message; None for any other message."""
    found = re.search(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
