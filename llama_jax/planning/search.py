"""Alternatives to a plan on the same devices, by estimate: what fits, and how fast it is.

Training: first another mesh, microbatch and remat policy, which leave the result of a step as it
is; then moments of lower precision; then a smaller batch. Decoding: fewer bits for weights, then
for the cache, then shorter contexts.
"""

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from llama_jax.config import Config, MeshConfig
from llama_jax.distributed.mesh import require_fitting
from llama_jax.errors import UsageError
from llama_jax.planning.decoding import DecodingPlan, plan_decoding
from llama_jax.planning.memory import abstract_mesh, remat_policy
from llama_jax.planning.targets import Target
from llama_jax.planning.training import Compiler, Estimate, TrainingPlan, estimate
from llama_jax.quantization import KINDS

MARGIN = 0.15  # of the memory, left free by alternatives: the estimate's largest error
MAX_TENSOR = 8  # devices of one machine; beyond, each block's collectives cost too much
# "offload" is not proposed: its speed depends on the host's link, which no data sheet names.
POLICIES = ("none", "save-matmuls", "block", "save-qkv")
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

    limit = 1
    while fits(limit):
        limit *= 2
    between = range(limit // 2 + 1, limit)  # limit // 2 sequences fit, limit do not
    return devices * (limit // 2 + bisect.bisect_left(between, True, key=lambda n: not fits(n)))


def cheapest_that_fits(config: Config, target: Target, correction: float = 1.0) -> Estimate | None:
    """Return the fastest alternative that fits with a margin, of those that change least."""
    narrow = dataclasses.replace(config.optimizer, moments_dtype="bfloat16")
    bases = [config, dataclasses.replace(config, optimizer=narrow)]
    batch, once = config.data.batch_size, dataclasses.replace(narrow, accumulation_steps=1)
    while batch % 2 == 0:
        batch //= 2
        data = dataclasses.replace(config.data, batch_size=batch)
        bases.append(dataclasses.replace(config, data=data, optimizer=once))
    for base in bases:
        if found := ranked(base, target, correction):
            return found[0]
    return None


def ranked(config: Config, target: Target, correction: float = 1.0) -> list[Estimate]:
    """Return the alternatives that fit with a margin, the fastest predicted first.

    For each mesh and remat policy the one with the fewest microbatches that fit.
    """
    found = []
    for mesh, remat in itertools.product(meshes(config, target.devices), POLICIES):
        if remat == remat_policy(config, target.chip):
            remat = config.run.remat  # which may be "auto"
        run = dataclasses.replace(config.run, remat=remat)
        for count in _divisors(config.data.batch_size // (mesh.data * mesh.fsdp)):
            optimizer = dataclasses.replace(config.optimizer, accumulation_steps=count)
            alternative = dataclasses.replace(config, mesh=mesh, run=run, optimizer=optimizer)
            estimated = estimate(alternative, target, correction)
            if _fits(estimated, target, MARGIN, correction):
                found.append(estimated)
                break

    def key(way: Estimate) -> tuple[float, float, int]:
        new, together = way.config, sum(dataclasses.astuple(way.speed))
        changes = (
            (new.mesh != config.mesh)
            + (new.run.remat != config.run.remat)
            + (new.optimizer.accumulation_steps != config.optimizer.accumulation_steps)
        )
        return _rounded(way.speed.seconds), _rounded(together), changes

    return sorted(found, key=key)


def _rounded(seconds: float) -> float:
    """Return three significant digits: closer predictions are equal."""
    return float(f"{seconds:.3g}")


def _fits(way: Estimate, target: Target, margin: float, correction: float) -> bool:
    return way.memory.total <= (1 - margin) * (target.chip.usable / correction)


def meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """Yield the meshes over which the run divides evenly."""
    once = dataclasses.replace(config.optimizer, accumulation_steps=1)
    tensors = [n for n in _divisors(min(devices, MAX_TENSOR)) if devices % n == 0]
    for tensor in tensors:
        for fsdp, sequence in itertools.product(_divisors(devices // tensor), (False, True)):
            if sequence and tensor == 1:
                continue
            data = devices // tensor // fsdp
            mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
            alternative = dataclasses.replace(config, mesh=mesh, optimizer=once)
            with contextlib.suppress(UsageError):
                require_fitting(alternative, abstract_mesh(mesh, devices).shape)
                yield mesh


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def largest_decoding_batch(plan: DecodingPlan) -> int:
    """Return the most sequences, up to those of the plan, that fit by estimate; 0: none does."""

    def is_too_large(batch: int) -> bool:
        return _changed(plan, batch=batch).estimated > plan.target.chip.usable

    return bisect.bisect_left(range(1, plan.options.batch + 1), True, key=is_too_large)


def cheapest_decoding_change(plan: DecodingPlan) -> DecodingPlan | None:
    """Return the first plan that fits all sequences with a margin, of ever larger changes.

    Weights in fewer bits, then the cache in int8 too, then shorter contexts as well.
    """
    options, context = plan.options, plan.model.context_length
    contexts = [options.context]
    while (context := context // 2) >= MIN_CONTEXT:
        contexts.append(context)
    cache_dtypes = [options.cache_dtype] if options.cache_dtype else ["", "int8"]
    kinds = ["", *KINDS]
    kinds = kinds[kinds.index(options.quantize) :]
    for tokens, cache_dtype, kind in itertools.product(contexts, cache_dtypes, kinds):
        found = _changed(plan, context=tokens, cache_dtype=cache_dtype, quantize=kind)
        if found.estimated <= (1 - MARGIN) * plan.target.chip.usable:
            return found
    return None


def _changed(plan: DecodingPlan, **changes: Any) -> DecodingPlan:
    options = dataclasses.replace(plan.options, **changes)
    return plan_decoding(plan.model, options, plan.target)
