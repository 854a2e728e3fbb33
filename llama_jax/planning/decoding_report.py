"""A plan for sampling as text: what it takes, whether it fits, and what would."""

import dataclasses

from llama_jax.planning.decoding_alternatives import cheapest_sampling, largest_batch
from llama_jax.planning.decoding_plan import DecodingPlan
from llama_jax.planning.report import (
    GIB,
    counted,
    doubt_lines,
    exchange_lines,
    memory_table,
    spelled,
    verdict,
)


def decoding_report(plan: DecodingPlan) -> str:
    """The whole report of a sampling plan, several lines."""
    sampling, model, speed = plan.sampling, plan.model, plan.speed
    whole = f" (whole on each: {', '.join(plan.uncut)})" if plan.uncut else ""
    temporary = [plan.temporary]
    if plan.compiled:  # weights and cache are what they are
        temporary.insert(0, plan.total - plan.weights - plan.cache)
    columns = ["compiled", "estimated"][-len(temporary) :]
    kinds = {
        kind: [size] * len(columns)
        for kind, size in (("weights", plan.weights), ("cache", plan.cache))
    }
    parts = [
        plan.target.description,
        f"sampling: {counted(sampling.batch, 'text')} × {model.context_length} tokens;"
        f" weights {sampling.quantize or model.compute_dtype} over tensor {plan.target.devices}"
        f"{whole},"
        f" cache {sampling.cache_dtype or model.compute_dtype}",
        "",
        *memory_table(columns, {**kinds, "temporary": temporary}),
        verdict(plan.total, plan.target, plan.fits),
        *doubt_lines(plan.total, plan.target, plan.fits and plan.compiled is None),
        *([] if plan.fits else _sampling_advice(plan)),
        "",
        *exchange_lines(plan.compiled, plan.target.devices),
        f"predicted, at the data sheet's peaks: bound by {speed.bottleneck},"
        f" {spelled(speed.seconds)} a token of each text or more,"
        f" {sampling.batch / speed.seconds:,.0f} tokens/s in all at most",
    ]
    return "\n".join(parts)


def _sampling_advice(plan: DecodingPlan) -> list[str]:
    """What would fit instead: fewer texts, and the least change that keeps them all."""
    most = largest_batch(plan)
    lines = [
        f"largest batch that fits, by estimate: {counted(most, 'text')}"
        if most
        else "this way not one text fits, by estimate"
    ]
    found = cheapest_sampling(plan)
    if found is None:
        return [*lines, "no shorter context or smaller integers fit; use more or larger chips"]
    flags = [
        f"--{name}={now}"
        for name, now in dataclasses.asdict(found.sampling).items()
        if now != getattr(plan.sampling, name)
    ]
    return [
        *lines,
        f"cheapest change that fits, by estimate: {' '.join(flags)},"
        f" {found.estimated / GIB:.2f} GiB",
    ]
