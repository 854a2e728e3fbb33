"""The machines that chips are sold in, and how they are called: slices of TPUs, servers of GPUs.

Cloud TPU names slices of v5e and v6e by chips, the others by TensorCores: v5p-64 has 32 chips.
"""

from llama_jax.instruments.chips import Chip

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
