"""What the makers' data sheets say of the accelerators that a run may meet.

A `Chip` is what JAX calls one device: half of a TPU v2, v3 or tpu7x chip, the whole of any other.
Does not know which devices are here, nor what they are used for.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device: what it computes, holds and moves."""

    name: str
    kinds: tuple[str, ...]  # names that JAX's `device_kind` may have in it, as whole words
    flops: float  # dense bfloat16 peak, FLOP/s (float16 on T4, which has no bfloat16)
    memory: float  # bytes of device memory, as sold
    usable: float  # bytes of it that JAX gives to programs unless told otherwise
    bandwidth: float  # bytes/s between chip and device memory
    link: float  # bytes/s over all links to other chips, both directions together
    capability: str = ""  # of a GPU, as CUDA counts them

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler makes programs for it."""
        return any(kind.startswith("TPU") for kind in self.kinds)


def _chip(
    name: str, kinds: tuple[str, ...], figures: tuple[float, ...], capability: str = ""
) -> Chip:
    """A device by its figures: TFLOP/s, GiB sold, GiB usable, GB/s, GB/s of links."""
    flops, memory, usable, bandwidth, link = figures
    return Chip(
        name=name,
        kinds=kinds,
        flops=flops * 1e12,
        memory=memory * GIB,
        usable=usable * GIB,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        capability=capability,
    )


def _tpu(name: str, kinds: tuple[str, ...], *figures: float) -> Chip:
    """A TPU device; usable is what the TPU compiler allows."""
    return _chip(name, kinds, figures)


GPU_SHARE = 0.75  # of a GPU's memory that JAX takes; XLA_PYTHON_CLIENT_MEM_FRACTION changes it


def _gpu(name: str, kinds: tuple[str, ...], capability: str, *figures: float) -> Chip:
    """A GPU: TFLOP/s, GiB sold, GiB that its driver shows, GB/s, GB/s of links."""
    flops, memory, shown, bandwidth, link = figures
    return _chip(name, kinds, (flops, memory, GPU_SHARE * shown, bandwidth, link), capability)


# Sources: cloud.google.com/tpu/docs (one page a version; v2 and v3 also Norrie et al. 2021, table
# 1), and NVIDIA's data sheets; the GiB allowed by TPU compilers as libtpu 0.0.42 states them.
_ALL = (
    _tpu("v2", ("TPU v2",), 22.5, 8, 7.48, 350, 248),
    _tpu("v3", ("TPU v3",), 61.5, 16, 15.48, 450, 280),
    _tpu("v4", ("TPU v4",), 275, 32, 30.75, 1228, 600),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 15.75, 819, 400),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 96, 95.74, 2765, 1200),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 31.25, 1638, 800),
    _tpu("tpu7x", ("TPU7x", "TPU v7x", "TPU v7"), 1153.5, 96, 94.75, 3690, 600),
    _gpu("A100-40", ("A100-SXM4-40GB", "A100-PCIE-40GB", "A100"), "8.0", 312, 40, 40, 1555, 600),
    _gpu(
        "A100-80", ("A100-SXM4-80GB", "A100-SXM-80GB", "A100 80GB"), "8.0", 312, 80, 80, 2039, 600
    ),
    _gpu("H100", ("H100",), "9.0", 989, 80, 79.6, 3350, 900),
    _gpu("H100-PCIe", ("H100 PCIe",), "9.0", 756, 80, 79.6, 2000, 600),
    _gpu("H200", ("H200",), "9.0", 989, 141, 140.4, 4800, 900),
    _gpu("B200", ("B200",), "10.0", 2250, 180, 179, 8000, 1800),
    _gpu("L4", ("L4",), "8.9", 121, 24, 22.5, 300, 64),
    _gpu("T4", ("T4",), "7.5", 65, 16, 15, 320, 32),
)
CHIPS = {chip.name: chip for chip in _ALL}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind such as "TPU v5 lite" or "NVIDIA H200", or None.

    Kinds match as whole words ("L4" is not in "NVIDIA L40S"), the longest one first.
    """
    kinds = sorted(((kind, chip) for chip in _ALL for kind in chip.kinds), key=lambda p: -len(p[0]))
    for kind, chip in kinds:
        if re.search(rf"(?<!\w){re.escape(kind)}(?!\w)", device_kind):
            return chip
    return None


def peak_flops(device: jax.Device, given: float = 0.0) -> float:
    """Return the peak FLOP/s of a device: `given`, or dense bfloat16 of its chip; 0: unknown."""
    chip = chip_of(device.device_kind)
    return given or (chip.flops if chip else 0.0)


# The machines that chips are sold in, and how they are called: slices of TPUs, servers of GPUs.
#
# Cloud TPU names slices of v5e and v6e by chips, the others by TensorCores: v5p-64 has 32 chips.

# Chips of a slice → its topology, for two-dimensional and three-dimensional networks.
HAVE_FLAT_SLICES = ("v2", "v3", "v5e", "v6e")
FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
SOLID = {
    1: "1x1x1",
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
NAMED_BY_CORES = ("v2", "v3", "v4", "v5p", "tpu7x")  # two TensorCores a chip
CORES_ARE_DEVICES = ("v2", "v3", "tpu7x")  # on the others JAX sees a chip as one device
GPUS_A_MACHINE = 8


def shapes(chip: Chip) -> dict[int, str]:
    """The topologies of a TPU's slices, by their number of chips."""
    return FLAT if chip.name in HAVE_FLAT_SLICES else SOLID


def is_gpu_machine(count: int) -> bool:
    """Whether so many GPUs are a part of one server, or whole ones."""
    return count in (1, 2, 4) or (count > 0 and count % GPUS_A_MACHINE == 0)


def machine_name(chip: Chip, devices: int) -> str:
    """What so many devices are called, such as "v5p-64"; "" if there is no such machine."""
    if not chip.is_tpu:
        return f"{chip.name}-{devices}" if is_gpu_machine(devices) else ""
    chips, rest = divmod(devices, 2 if chip.name in CORES_ARE_DEVICES else 1)
    if rest or chips not in shapes(chip):
        return ""
    return f"{chip.name}-{chips * (2 if chip.name in NAMED_BY_CORES else 1)}"


# Memory that this process uses of its devices, as their runtime counts it.
#
# A CPU's runtime counts nothing: there it is the memory of the process itself. Asking copies
# nothing
# from a device and waits for none.


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of the device that came closest to its limit."""

    in_use: int
    peak: int  # the most in use since the process began
    limit: int  # 0: not known


def memory_use(devices: Iterable[jax.Device]) -> MemoryUse | None:
    """The memory in use on the fullest of these devices that are this process's; None: unknown."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    used = [
        MemoryUse(
            stats["bytes_in_use"],
            stats.get("peak_bytes_in_use", stats["bytes_in_use"]),
            stats.get("bytes_limit", 0),
        )
        for device in mine
        if (stats := device.memory_stats()) and "bytes_in_use" in stats
    ]
    if used:
        return max(used, key=lambda use: use.peak)
    return _of_process() if mine and mine[0].platform == "cpu" else None


def memory_limit(devices: Iterable[jax.Device]) -> int:
    """Bytes that programs may use of the smallest of these devices; 0: not known."""
    use = memory_use(devices)
    return use.limit if use else 0


def _of_process() -> MemoryUse | None:
    """The resident memory of this process, and the machine's as the limit."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        page = os.sysconf("SC_PAGE_SIZE")
        limit = page * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, OSError, ValueError):  # a system that does not tell
        return None
    peak *= 1 if sys.platform == "darwin" else 1024
    statm = Path("/proc/self/statm")
    in_use = page * int(statm.read_text().split()[1]) if statm.is_file() else peak
    return MemoryUse(in_use, max(peak, in_use), limit)
