"""What the makers' data sheets say of the accelerators that a run may meet.

A `Chip` is what JAX calls one device: half of a TPU v2, v3 or tpu7x chip, the whole of any other.
Does not know which devices are here, nor what they are used for.
"""

import dataclasses
import re

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
