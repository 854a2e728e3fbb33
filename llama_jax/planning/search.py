"""Alternatives to a plan on the same devices, by estimate: what fits, and how fast it is.

Training: first another mesh, microbatch and remat policy, which leave the result of a step as it
is; then moments of lower precision; then a smaller batch. Decoding: fewer bits for weights, then
for the cache, then shorter contexts.
"""

import bisect
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from llama_jax.config import Config, MeshConfig
from llama_jax.distributed.fitting import require_fitting
from llama_jax.errors import UsageError
from llama_jax.planning.decoding import DecodingPlan, plan_decoding
from llama_jax.planning.memory import abstract_mesh
from llama_jax.planning.targets import Target
from llama_jax.planning.training import Compiler, Estimate, TrainingPlan, estimate

MARGIN = 0.15  # of the memory, left free by alternatives: the estimate's largest error
MAX_TENSOR = 8  # devices of one machine; beyond, each block's collectives cost too much
# "offload" is not proposed: its speed depends on the host's link, which no data sheet names.
POLICIES = ("none", "block", "save-qkv")
SHOWN = 10  # alternatives that a search returns
COMPILED = 3  # of them, at a minute or two each
MIN_CONTEXT = 256  # tokens of the shortest context that is proposed


def search(config: Config, target: Target, compiler: Compiler | None = None) -> list[TrainingPlan]:
    """Return the best alternatives that fit, the fastest predicted first.

    Args:
      compiler: for TPUs, checks the first `COMPILED`, leaving out what it refuses; None: estimates.
    """
    found: list[TrainingPlan] = []
    for alternative in ranked(config, target):
        if len(found) == SHOWN:
            break
        checks = compiler if len(found) < COMPILED else None
        compiled = checks(alternative, target) if checks else None
        if compiled is None or compiled.fits:
            found.append(TrainingPlan(alternative, target, compiled))
    return sorted(found, key=lambda plan: _rounded(plan.speed.seconds))  # ties: as ranked


def largest_microbatch(config: Config, target: Target, correction: float = 1.0) -> int:
    """Return the most sequences of one microbatch, over all devices, that fit; 0: none does.

    More sequences per step are more microbatches, which need no more memory.

    Args:
      correction: bytes that the compiler uses for each estimated byte.
    """
    mesh = abstract_mesh(config.mesh, target.devices)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def fits(per_device: int) -> bool:
        batch = per_device * devices * config.optimizer.accumulation_steps
        data = dataclasses.replace(config.data, batch_size=batch)
        alternative = estimate(dataclasses.replace(config, data=data), target, correction)
        return _fits(alternative, target, 0.0, correction)

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * devices


def cheapest_that_fits(config: Config, target: Target, correction: float = 1.0) -> Estimate | None:
    """Return the fastest alternative that fits with a margin, of those that change least."""
    narrow = dataclasses.replace(config.optimizer, moments_dtype="bfloat16")
    compact = dataclasses.replace(config, optimizer=narrow)
    for base in (config, compact, *_smaller_batches(compact)):
        if found := ranked(base, target, correction):
            return found[0]
    return None


def ranked(config: Config, target: Target, correction: float = 1.0) -> list[Estimate]:
    """Return the alternatives that fit with a margin, the fastest predicted first.

    For each mesh and remat policy the one with the fewest microbatches that fit.
    """
    found = [
        best
        for alternative in _alternatives(config, target)
        if (best := _fewest_microbatches(alternative, target, correction))
    ]

    def key(way: Estimate) -> tuple[float, float, int]:
        together = sum(dataclasses.astuple(way.speed))
        return _rounded(way.speed.seconds), _rounded(together), _changes(way.config, config)

    return sorted(found, key=key)


def _rounded(seconds: float) -> float:
    """Return three significant digits: closer predictions are equal."""
    return float(f"{seconds:.3g}")


def _smaller_batches(config: Config) -> Iterator[Config]:
    """Yield the config with half the batch, a quarter, and so on, in one microbatch."""
    batch = config.data.batch_size
    while batch % 2 == 0:
        batch //= 2
        data = dataclasses.replace(config.data, batch_size=batch)
        once = dataclasses.replace(config.optimizer, accumulation_steps=1)
        yield dataclasses.replace(config, data=data, optimizer=once)


def _fits(way: Estimate, target: Target, margin: float, correction: float) -> bool:
    return way.memory.total <= (1 - margin) * (target.chip.usable / correction)


def _fewest_microbatches(config: Config, target: Target, correction: float) -> Estimate | None:
    """Return the estimate with the fewest microbatches that fit; None: not one sequence does."""
    batch = config.data.batch_size // (config.mesh.data * config.mesh.fsdp)
    for count in _divisors(batch):
        optimizer = dataclasses.replace(config.optimizer, accumulation_steps=count)
        way = estimate(dataclasses.replace(config, optimizer=optimizer), target, correction)
        if _fits(way, target, MARGIN, correction):
            return way
    return None


def _alternatives(config: Config, target: Target) -> Iterator[Config]:
    """Yield the config on each mesh that divides it, with each remat policy."""
    for mesh in meshes(config, target.devices):
        for remat in POLICIES:
            run = dataclasses.replace(config.run, remat=remat)
            yield dataclasses.replace(config, mesh=mesh, run=run)


def meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """Yield the meshes over which the run divides evenly."""
    for tensor in _divisors(min(devices, MAX_TENSOR)):
        for fsdp in _divisors(devices // tensor) if devices % tensor == 0 else []:
            for sequence in (False, True)[: 1 if tensor == 1 else 2]:
                mesh = MeshConfig(
                    data=devices // tensor // fsdp, fsdp=fsdp, tensor=tensor, sequence=sequence
                )
                once = dataclasses.replace(config.optimizer, accumulation_steps=1)
                alternative = dataclasses.replace(config, mesh=mesh, optimizer=once)
                with contextlib.suppress(UsageError):
                    require_fitting(alternative, abstract_mesh(mesh, devices).shape)
                    yield mesh


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _changes(new: Config, old: Config) -> int:
    """Return how many settings differ."""
    pairs = (
        (new.mesh, old.mesh),
        (new.run.remat, old.run.remat),
        (new.optimizer.accumulation_steps, old.optimizer.accumulation_steps),
    )
    return sum(one != other for one, other in pairs)


def largest_decoding_batch(plan: DecodingPlan) -> int:
    """Return the most sequences, up to those of the plan, that fit by estimate; 0: none does."""
    batches = range(1, plan.options.batch + 1)

    def is_too_large(batch: int) -> bool:
        return _changed(plan, batch=batch).estimated > plan.target.chip.usable

    return bisect.bisect_left(batches, True, key=is_too_large)


def cheapest_decoding_change(plan: DecodingPlan) -> DecodingPlan | None:
    """Return the first plan that fits all sequences with a margin, of ever larger changes."""
    for changes in _decoding_changes(plan):
        found = _changed(plan, **changes)
        if found.estimated <= (1 - MARGIN) * plan.target.chip.usable:
            return found
    return None


def _decoding_changes(plan: DecodingPlan) -> Iterator[dict[str, Any]]:
    """Yield options: weights in fewer bits, then the cache too, then shorter contexts as well."""
    kinds = {"": ("", "int8", "int4"), "int8": ("int8", "int4"), "int4": ("int4",)}
    cache_dtypes = ("",) if plan.options.cache_dtype == "int8" else ("", "int8")
    full = context = plan.model.context_length
    while context >= min(MIN_CONTEXT, full):
        for cache_dtype in cache_dtypes:
            for quantize in kinds[plan.options.quantize]:
                shorter = {} if context == full else {"context": context}
                cache = {"cache_dtype": cache_dtype or plan.options.cache_dtype}
                yield {"quantize": quantize, **cache, **shorter}
        context //= 2


def _changed(plan: DecodingPlan, **changes: Any) -> DecodingPlan:
    options = dataclasses.replace(plan.options, **changes)
    return plan_decoding(plan.model, options, plan.target)
