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
    by_shape = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", name)
    if by_shape:
        return _slice(name, _chip(by_shape[1], name), by_shape[2])
    by_count = re.fullmatch(r"([\w-]+?)-(\d+)", name)
    if not by_count:
        raise UsageError(
            f"target {name!r} is not a chip and a number of chips; expected such as v5e-8 or"
            f" H200-1{did_you_mean(name, _names())}"
        )
    chip, count = _chip(by_count[1], name), int(by_count[2])
    if chip.is_tpu:
        return _slice(name, chip, _shape(chip, count, name))
    if not is_gpu_machine(count):
        raise UsageError(
            f"target {name!r} has {count} GPUs; expected 1, 2, 4 or a multiple of"
            f" {GPUS_PER_MACHINE}"
        )
    return Target(name=name, chip=chip, devices=count)


def _names() -> list[str]:
    """Return every target name with a number, of all chips."""
    return [
        f"{chip.name}-{count}"
        for chip in CHIPS.values()
        for count in (_counts(chip) if chip.is_tpu else (8, 1, 2, 4))
    ]


def _chip(written: str, target: str) -> Chip:
    found = ALIASES.get(written.lower(), written)
    by_name = {name.lower(): chip for name, chip in CHIPS.items()}
    if found.lower() not in by_name:
        raise UsageError(
            f"target {target!r}: chip {written!r} is unknown{did_you_mean(written, CHIPS)};"
            f" expected one of {', '.join(CHIPS)}"
        )
    return by_name[found.lower()]


def _counts(chip: Chip) -> dict[int, str]:
    """Return the shapes of slices by the number in their names: of chips, or of TensorCores."""
    per_chip = 2 if chip.name in NAMED_BY_CORES else 1
    return {chips * per_chip: shape for chips, shape in shapes(chip).items()}


def _shape(chip: Chip, count: int, target: str) -> str:
    """Return the shape of the slice with `count` in its name."""
    counts = _counts(chip)
    if count not in counts:
        closest = min(counts, key=lambda known: abs(math.log(known / max(count, 1))))
        raise UsageError(
            f"target {target!r}: there is no {chip.name} slice of {count}"
            f" {'TensorCores' if chip.name in NAMED_BY_CORES else 'chips'}; the nearest is"
            f" {chip.name}-{closest}"
        )
    return counts[count]


def _slice(name: str, chip: Chip, shape: str) -> Target:
    if not chip.is_tpu:
        raise UsageError(f"target {name!r}: only TPU slices have a shape; expected {chip.name}-8")
    example = shapes(chip)[8]
    if shape.count("x") != example.count("x"):
        raise UsageError(
            f"target {name!r}: a {chip.name} slice has {example.count('x') + 1} axes, not"
            f" {shape.count('x') + 1}; expected such as {chip.name}:{example}"
        )
    sides = tuple(map(int, shape.split("x")))
    if not _is_offered(chip, sides):
        raise UsageError(
            f"target {name!r}: there is no {chip.name} slice {shape}; expected one of"
            f" {', '.join(shapes(chip).values())}"
            + ("" if len(sides) == 2 else ", or rising multiples of 4 such as 4x4x12")
        )
    chips = math.prod(sides)
    devices = chips * (2 if chip.name in CORES_ARE_DEVICES else 1)
    return Target(name=name, chip=chip, devices=devices, topology=f"{chip.name}:{shape}")


def _is_offered(chip: Chip, sides: tuple[int, ...]) -> bool:
    """Return whether Cloud TPU offers the shape: a named one, or any made of 4x4x4 cubes."""
    is_of_cubes = len(sides) == 3 and all(side % 4 == 0 for side in sides)
    named = "x".join(map(str, sides)) in shapes(chip).values()
    return named or (is_of_cubes and list(sides) == sorted(sides))
