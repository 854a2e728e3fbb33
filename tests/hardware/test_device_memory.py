"""Memory statistics of devices and of the process."""

import mmap
import os
import sys
from types import SimpleNamespace

import jax
import pytest

from llama_jax.hardware.accelerators import MemoryUse, memory_limit, memory_use


def device(stats, process_index=0, platform="gpu"):
    return SimpleNamespace(
        platform=platform, process_index=process_index, memory_stats=lambda: stats
    )


def test_the_statistics_are_those_of_the_device_with_the_highest_peak():
    devices = [
        device({"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 11}),
        device({"bytes_in_use": 4, "peak_bytes_in_use": 9, "bytes_limit": 12}),
        device({"bytes_in_use": 99, "peak_bytes_in_use": 99}, process_index=1),
    ]
    assert memory_use(devices) == MemoryUse(in_use=4, peak=9, limit=12)
    assert memory_limit(devices) == 12


def test_devices_with_few_or_no_statistics():
    assert memory_use([device({"bytes_in_use": 5})]) == MemoryUse(5, 5, 0)
    for stats in (None, {}, {"num_allocs": 3}):
        assert memory_use([device(stats)]) is None
        assert memory_limit([device(stats)]) == 0
    assert memory_use([device(None, process_index=1)]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_on_cpu_the_statistics_are_those_of_the_process():
    before = memory_use(jax.devices())
    size = 64 * 2**20
    with mmap.mmap(-1, size) as block:
        block.write(b"x" * size)
        during = memory_use(jax.devices())
    after = memory_use(jax.devices())
    assert during.in_use - before.in_use == pytest.approx(size, rel=0.5)
    assert after.in_use < during.in_use <= after.peak
    assert during.limit == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
