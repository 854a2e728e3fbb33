"""Accelerators: peak FLOP/s, memory and bandwidth by chip, machines by name, memory in use.

A `Chip` is one device in JAX's sense: half of a TPU v2, v3 or tpu7x chip, all of any other.
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
    """The data sheet of one device."""

    name: str
    kinds: tuple[str, ...]  # words that JAX's `device_kind` contains
    flops: float  # dense bfloat16 peak, FLOP/s (float16 on T4, which has no bfloat16)
    memory: float  # bytes of device memory, as sold
    usable: float  # bytes that programs may use by JAX's default
    bandwidth: float  # bytes/s between chip and device memory
    link: float  # bytes/s over all links to other chips, sum of both directions
    capability: str = ""  # CUDA compute capability of a GPU

    @property
    def is_tpu(self) -> bool:
        """Whether the chip is a TPU."""
        return any(kind.startswith("TPU") for kind in self.kinds)


def _chip(
    name: str, kinds: tuple[str, ...], figures: tuple[float, ...], capability: str = ""
) -> Chip:
    """Return a chip; `figures`: TFLOP/s, GiB of memory, GiB usable, GB/s, GB/s of links."""
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
    """Return a TPU; usable is what the TPU compiler allows."""
    return _chip(name, kinds, figures)


GPU_FRACTION = 0.75  # of GPU memory that JAX takes; see XLA_PYTHON_CLIENT_MEM_FRACTION


def _gpu(name: str, kinds: tuple[str, ...], capability: str, *figures: float) -> Chip:
    """Return a GPU; `figures`: TFLOP/s, GiB of memory, GiB shown by its driver, GB/s, link GB/s."""
    flops, memory, shown, bandwidth, link = figures
    return _chip(name, kinds, (flops, memory, GPU_FRACTION * shown, bandwidth, link), capability)


# Sources: cloud.google.com/tpu/docs, a page per version (for v2 and v3 also Norrie et al. 2021,
# table 1); NVIDIA's data sheets; usable GiB of TPUs as reported by libtpu 0.0.42.
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
    """Return the chip of a JAX `device_kind` such as "TPU v5 lite" or "NVIDIA H200", or None.

    Kinds match whole words ("L4" is not in "NVIDIA L40S"), the longest first.
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


# Topologies of TPU slices by their number of chips, with two-dimensional and three-dimensional
# networks.
CHIPS_WITH_2D_SLICES = ("v2", "v3", "v5e", "v6e")
SLICES_2D = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
SLICES_3D = {
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
NAMED_BY_CORES = ("v2", "v3", "v4", "v5p", "tpu7x")  # by TensorCores, two per chip
CORES_ARE_DEVICES = ("v2", "v3", "tpu7x")  # elsewhere a chip is one JAX device
GPUS_PER_MACHINE = 8


def shapes(chip: Chip) -> dict[int, str]:
    """Return the topologies of a TPU's slices by their number of chips."""
    return SLICES_2D if chip.name in CHIPS_WITH_2D_SLICES else SLICES_3D


def adds_along_all_axes(chip: Chip, devices: int) -> bool:
    """Return whether XLA adds up arrays of all devices of a TPU slice along all its axes at once.

    That is an all-reduce, and stays one where each device needs its shard of the sum alone. In
    slices with two unequal axes it is a ring through all devices, in which shards are added up.
    """
    if not chip.is_tpu:
        return False
    sides = [int(side) for side in shapes(chip).get(devices, "1x1").split("x")]
    sides = [side for side in sides if side > 1]
    return len(sides) == 3 or (len(sides) == 2 and sides[0] == sides[1] > 2)


def is_gpu_machine(count: int) -> bool:
    """Return whether `count` GPUs are part of one machine, or whole machines."""
    return count in (1, 2, 4) or (count > 0 and count % GPUS_PER_MACHINE == 0)


def machine_name(chip: Chip, devices: int) -> str:
    """Return the name of a machine, such as "v5p-64"; "" if there is none of that size."""
    if not chip.is_tpu:
        return f"{chip.name}-{devices}" if is_gpu_machine(devices) else ""
    chips, rest = divmod(devices, 2 if chip.name in CORES_ARE_DEVICES else 1)
    if rest or chips not in shapes(chip):
        return ""
    return f"{chip.name}-{chips * (2 if chip.name in NAMED_BY_CORES else 1)}"


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory statistics of one device, in bytes."""

    in_use: int
    peak: int  # since the process started
    limit: int  # 0: unknown


def memory_use(devices: Iterable[jax.Device]) -> MemoryUse | None:
    """Return the statistics of this process's device with the highest peak; None: unknown.

    They come from the device's runtime and wait for no computation. On CPU, whose runtime counts
    nothing, they are those of the process.
    """
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
    return _process_memory() if mine and mine[0].platform == "cpu" else None


def memory_limit(devices: Iterable[jax.Device]) -> int:
    """Return the bytes that programs may use of one of these devices; 0: unknown."""
    use = memory_use(devices)
    return use.limit if use else 0


def _process_memory() -> MemoryUse | None:
    """Return this process's resident memory, with the machine's memory as the limit."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        page = os.sysconf("SC_PAGE_SIZE")
        limit = page * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, OSError, ValueError):  # not every system has them
        return None
    peak *= 1 if sys.platform == "darwin" else 1024
    statm = Path("/proc/self/statm")
    in_use = page * int(statm.read_text().split()[1]) if statm.is_file() else peak
    return MemoryUse(in_use, max(peak, in_use), limit)
