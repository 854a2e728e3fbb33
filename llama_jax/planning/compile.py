"""The TPU compiler on a machine without a TPU: it comes with the package libtpu.

Gives devices that are not there, to lower and compile programs for. Does not know which programs.
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.errors import UserError
from llama_jax.planning.targets import Target

# libtpu looks for a TPU's neighbours and its metadata server unless told that there are none, and
# keeps others from loading it: needless, since nothing here touches a device.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# The compiler places what it can in a chip's vector memory, 128 MiB on v5e, v5p and v6e, and its
# figure counts some of that and some not. Of large programs that is a trifle; smaller ones than
# this are compiled with all their arrays in the device's memory.
SMALL = 16 * 128 * 2**20
ALL_IN_DEVICE_MEMORY = {"xla_msa_enable": False}
LONGEST = 200  # characters of what the compiler complains of


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, on one device."""

    total: float  # bytes in use at the fullest moment, arguments included
    fits: bool  # whether the compiler made it
    text: str  # the program; "" if it does not fit
    seconds: float  # that lowering and compiling took


def target_mesh(config: MeshConfig, target: Target) -> Mesh:
    """A mesh of devices that are not here, to compile for.

    Raises:
      UserError: when libtpu is not installed or refuses the slice.
    """
    return make_mesh(config, tpu_devices(target))


def tpu_devices(target: Target) -> list[jax.Device]:
    """The devices of a TPU slice.

    Raises:
      UserError: when libtpu is not installed, is in use, or refuses the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"the TPU compiler is not installed and {target.name} needs it; install it with"
            " `pip install '.[plan]'`, or add --fast for the estimate alone"
        )
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
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology, **options
        )
    except Exception as error:
        if "lockfile" in str(error):
            raise UserError(
                "another process uses the TPU compiler (it locks /tmp/libtpu_lockfile); wait for"
                " it to end, or add --fast for the estimate alone"
            ) from error
        raise UserError(f"libtpu refuses the slice {target.topology}: {error}") from error
    return list(slice_.devices)


def compiled(lower: Callable[[], Any], expected: float) -> Compiled:
    """What a program compiles to; `lower` lowers it, and by estimate it takes `expected` bytes.

    One too large for the device is an answer, not an error: the compiler says what it would take.

    Raises:
      UserError: when the compiler fails for another reason.
    """
    options: Any = ALL_IN_DEVICE_MEMORY if expected < SMALL else None
    start = time.perf_counter()
    try:
        program = lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        total = memory_asked_for(str(error))
        if total is None:
            said = str(error).strip().partition("\n")[0][:LONGEST]
            raise UserError(
                f"the TPU compiler fails on this program: {said}; try another version of libtpu or"
                " --config.run.remat, or add --fast for the estimate alone"
            ) from error
        return Compiled(total, False, "", time.perf_counter() - start)
    # The peak is what the compiler holds against the device's memory. The sum of arguments and
    # temporaries is larger: some of these lie where an argument was.
    total = program.memory_analysis().peak_memory_in_bytes
    return Compiled(total, True, program.as_text(), time.perf_counter() - start)


def memory_asked_for(message: str) -> float | None:
    """The bytes of a program refused for want of memory; None for a message of something else."""
    asked = re.search(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or not asked:
        return None
    return float(asked[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[asked[2]]
