"""Targets by name, such as v5e-8 or H200-1: which chip, how many, and in which topology.

TPU slices have Cloud TPU's names: v5e and v6e count chips, the others TensorCores, so that v5p-64
has 32 chips.
"""

import dataclasses
import math
import re

from llama_jax.errors import UsageError, did_you_mean
from llama_jax.hardware.accelerators import (
    CHIPS,
    CORES_ARE_DEVICES,
    GPUS_PER_MACHINE,
    NAMED_BY_CORES,
    Chip,
    is_gpu_machine,
    shapes,
)

ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "tpu7": "tpu7x"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices that a plan is for."""

    name: str
    chip: Chip
    devices: int  # as JAX counts them
    topology: str = ""  # the TPU compiler's name of the slice; "" for GPUs

    @property
    def description(self) -> str:
        """How the name was understood, such as "v5p-64: 32 × TPU v5p, slice 2x4x4"."""
        kind = f"TPU {self.chip.name}" if self.chip.is_tpu else self.chip.name
        kind = kind.replace("TPU tpu", "TPU ")
        half = " halves" if self.chip.name in CORES_ARE_DEVICES else ""
        shape = self.topology.partition(":")[2]
        slice_ = f", slice {shape}" if shape else ", estimated only"
        return f"{self.name}: {self.devices} × {kind}{half}{slice_}"


def parse_target(name: str) -> Target:
    """Return the target of a name such as "v5e-8", "v5p-64", "H200-8" or, by shape, "v5e:2x4".

    Raises:
      UsageError: for an unknown chip or a number of chips that is not offered.
    """
    if by_shape := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", name):
        return _slice(name, _chip(by_shape[1], name), by_shape[2])
    by_count = re.fullmatch(r"([\w-]+?)-(\d+)", name)
    if not by_count:
        counts = {chip: _counts(chip) if chip.is_tpu else (8, 1, 2, 4) for chip in CHIPS.values()}
        names = [f"{chip.name}-{count}" for chip in counts for count in counts[chip]]
        raise UsageError(
            f"target {name!r} is not a chip and a number of chips; expected such as v5e-8 or"
            f" H200-1{did_you_mean(name, names)}"
        )
    chip, count = _chip(by_count[1], name), int(by_count[2])
    if not chip.is_tpu:
        if is_gpu_machine(count):
            return Target(name=name, chip=chip, devices=count)
        expected = f"1, 2, 4 or a multiple of {GPUS_PER_MACHINE}"
        raise UsageError(f"target {name!r} has {count} GPUs; expected {expected}")
    if shape := _counts(chip).get(count):
        return _slice(name, chip, shape)
    closest = min(_counts(chip), key=lambda known: abs(math.log(known / max(count, 1))))
    unit = "TensorCores" if chip.name in NAMED_BY_CORES else "chips"
    raise UsageError(
        f"target {name!r}: there is no {chip.name} slice of {count} {unit}; the nearest is"
        f" {chip.name}-{closest}"
    )


def _chip(written: str, target: str) -> Chip:
    found = ALIASES.get(written.lower(), written).lower()
    for name, chip in CHIPS.items():
        if name.lower() == found:
            return chip
    longer = [name for name in CHIPS if name.lower().startswith(found)]  # sold in two sizes
    meant = " or ".join(repr(target.replace(written, name, 1)) for name in longer)
    hint = f"; did you mean {meant}?" if longer else did_you_mean(written, CHIPS)
    raise UsageError(
        f"target {target!r}: chip {written!r} is unknown{hint}; expected one of {', '.join(CHIPS)}"
    )


def _counts(chip: Chip) -> dict[int, str]:
    """Return the shapes of slices by the number in their names: of chips, or of TensorCores."""
    per_chip = 2 if chip.name in NAMED_BY_CORES else 1
    return {chips * per_chip: shape for chips, shape in shapes(chip).items()}


def _slice(name: str, chip: Chip, shape: str) -> Target:
    if not chip.is_tpu:
        raise UsageError(f"target {name!r}: only TPU slices have a shape; expected {chip.name}-8")
    named, sides = shapes(chip), [int(side) for side in shape.split("x")]
    axes = named[8].count("x") + 1
    if len(sides) != axes:
        raise UsageError(
            f"target {name!r}: a {chip.name} slice has {axes} axes, not {len(sides)}; expected such"
            f" as {chip.name}:{named[8]}"
        )
    # Cloud TPU also offers three-dimensional slices made of cubes of 4x4x4.
    is_of_cubes = axes == 3 and all(side % 4 == 0 for side in sides) and sides == sorted(sides)
    if shape not in named.values() and not is_of_cubes:
        cubes = ", or rising multiples of 4 such as 4x4x12" if axes == 3 else ""
        expected = ", ".join(named.values()) + cubes
        raise UsageError(
            f"target {name!r}: there is no {chip.name} slice {shape}; expected one of {expected}"
        )
    devices = math.prod(sides) * (2 if chip.name in CORES_ARE_DEVICES else 1)
    return Target(name=name, chip=chip, devices=devices, topology=f"{chip.name}:{shape}")
