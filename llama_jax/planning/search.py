"""Other ways to run the same step on the same devices, by estimate: what fits, and how fast.

The mesh, the microbatch and what is kept for the backward pass may change, which changes nothing
of what is learnt; where that is not enough, the moments' precision, then the batch.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from llama_jax.config import Config, MeshConfig
from llama_jax.distributed.fitting import require_fitting
from llama_jax.errors import UsageError
from llama_jax.planning.memory import Memory, planned_mesh, training_memory
from llama_jax.planning.speed import Speed, training_speed
from llama_jax.planning.targets import Target

MARGIN = 0.15  # of the memory, left free by what is proposed: the estimate may be as far off
MOST_TENSOR = 8  # the devices of one machine; beyond, each block's exchanges cost too much
# "offload" is not proposed: its speed hangs on the host's link, which no data sheet names.
POLICIES = ("none", "block", "save-qkv")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A way to run a step, and what is expected of it."""

    config: Config
    memory: Memory
    speed: Speed


def estimate(config: Config, target: Target) -> Estimate:
    """The estimate for a config as it stands.

    Raises:
      UsageError: when it does not divide over the devices.
    """
    mesh = planned_mesh(config.mesh, target.devices)
    memory = training_memory(config, mesh, target.chip)
    return Estimate(config, memory, training_speed(config, mesh, target.chip, memory))


def largest_batch(config: Config, target: Target) -> int:
    """The most sequences of one microbatch, over all devices, that fit; 0 if not even one a device.

    More sequences a step are more microbatches: they need no more memory.
    """
    parts = config.microbatch_size // _rows(config, target)

    def fits(rows: int) -> bool:
        return _fits(estimate(_with_rows(config, rows * parts), target), target, 0.0)

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * parts


def cheapest_that_fits(config: Config, target: Target) -> Estimate | None:
    """The fastest predicted way that fits with a margin, changing as little as is enough."""
    narrow = dataclasses.replace(config.optimizer, moments_dtype="bfloat16")
    compact = dataclasses.replace(config, optimizer=narrow)
    for base in (config, compact, *_smaller(compact)):
        if found := ranked(base, target):
            return found[0]
    return None


def ranked(config: Config, target: Target) -> list[Estimate]:
    """Ways that fit, the fastest predicted first; for each mesh and policy, its best microbatch."""
    found = [estimated for way in _ways(config, target) if (estimated := _best(way, target))]

    def key(way: Estimate) -> tuple[float, float, int]:
        together = sum(dataclasses.astuple(way.speed))
        return _rounded(way.speed.seconds), _rounded(together), _changes(way.config, config)

    return sorted(found, key=key)


def _rounded(seconds: float) -> float:
    """With three figures: what differs by less is alike."""
    return float(f"{seconds:.3g}")


def _smaller(config: Config) -> Iterator[Config]:
    """The config with half the batch, a quarter, and so on: one microbatch needs no sums."""
    batch = config.data.batch_size
    while batch % 2 == 0:
        batch //= 2
        data = dataclasses.replace(config.data, batch_size=batch)
        once = dataclasses.replace(config.optimizer, accumulation_steps=1)
        yield dataclasses.replace(config, data=data, optimizer=once)


def _rows(config: Config, target: Target) -> int:
    """Rows of a microbatch on one device."""
    mesh = planned_mesh(config.mesh, target.devices)
    return config.microbatch_size // (mesh.shape["data"] * mesh.shape["fsdp"])


def _with_rows(config: Config, microbatch: int) -> Config:
    """The config with one microbatch of another size a step, or with as many as it has."""
    count = config.optimizer.accumulation_steps
    data = dataclasses.replace(config.data, batch_size=microbatch * count)
    return dataclasses.replace(config, data=data)


def _fits(way: Estimate, target: Target, margin: float) -> bool:
    return way.memory.total <= (1 - margin) * target.chip.usable


def _best(config: Config, target: Target) -> Estimate | None:
    """The config with the fewest microbatches that fit, or None where not one sequence does."""
    rows = config.data.batch_size // (config.mesh.data * config.mesh.fsdp)
    for count in _divisors(rows):
        optimizer = dataclasses.replace(config.optimizer, accumulation_steps=count)
        way = estimate(dataclasses.replace(config, optimizer=optimizer), target)
        if _fits(way, target, MARGIN):
            return way
    return None


def _ways(config: Config, target: Target) -> Iterator[Config]:
    """The config on each mesh that divides, with each policy."""
    for mesh in meshes(config, target.devices):
        for remat in POLICIES:
            run = dataclasses.replace(config.run, remat=remat)
            yield dataclasses.replace(config, mesh=mesh, run=run)


def meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """The meshes over which the run divides evenly."""
    for tensor in _divisors(min(devices, MOST_TENSOR)):
        for fsdp in _divisors(devices // tensor) if devices % tensor == 0 else []:
            for sequence in (False, True)[: 1 if tensor == 1 else 2]:
                mesh = MeshConfig(
                    data=devices // tensor // fsdp, fsdp=fsdp, tensor=tensor, sequence=sequence
                )
                once = dataclasses.replace(config.optimizer, accumulation_steps=1)
                way = dataclasses.replace(config, mesh=mesh, optimizer=once)
                with contextlib.suppress(UsageError):
                    require_fitting(way, planned_mesh(mesh, devices).shape)
                    yield mesh


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _changes(new: Config, old: Config) -> int:
    """How many choices differ."""
    pairs = (
        (new.mesh, old.mesh),
        (new.run.remat, old.run.remat),
        (new.optimizer.accumulation_steps, old.optimizer.accumulation_steps),
    )
    return sum(one != other for one, other in pairs)
