"""Memory that this process uses of its devices, as their runtime counts it.

A CPU's runtime counts nothing: there it is the memory of the process itself. Asking copies nothing
from a device and waits for none.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import jax


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
