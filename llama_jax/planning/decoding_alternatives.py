"""Other ways to sample on the same devices, by estimate: where a plan does not fit, what would."""

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any

from llama_jax.planning.alternatives import MARGIN
from llama_jax.planning.decoding_plan import DecodingPlan, plan_decoding

SHORTEST = 256  # tokens of a context that is worth proposing


def largest_batch(plan: DecodingPlan) -> int:
    """The most texts at once, up to those asked for, that fit; 0 if not one does."""
    texts = range(1, plan.sampling.batch + 1)
    return bisect.bisect_left(texts, True, key=lambda n: not _fits(_changed(plan, batch=n), 0.0))


def cheapest_sampling(plan: DecodingPlan) -> DecodingPlan | None:
    """The first way that fits all texts with a margin, of those that give up ever more."""
    for changes in _changes(plan):
        found = _changed(plan, **changes)
        if _fits(found, MARGIN):
            return found
    return None


def _changes(plan: DecodingPlan) -> Iterator[dict[str, Any]]:
    """Weights in fewer bits, then the cache too, then shorter contexts as well."""
    kinds = {"": ("", "int8", "int4"), "int8": ("int8", "int4"), "int4": ("int4",)}
    weights = kinds[plan.sampling.quantize]
    caches = ("",) if plan.sampling.cache_dtype == "int8" else ("", "int8")
    context = plan.model.context_length
    while context >= min(SHORTEST, plan.model.context_length):
        for cache in caches:
            for quantize in weights:
                changes = {"quantize": quantize, "cache_dtype": cache or plan.sampling.cache_dtype}
                yield changes | (
                    {} if context == plan.model.context_length else {"context": context}
                )
        context //= 2


def _changed(plan: DecodingPlan, **changes: Any) -> DecodingPlan:
    sampling = dataclasses.replace(plan.sampling, **changes)
    return plan_decoding(plan.model, sampling, plan.target, compile_it=False)


def _fits(plan: DecodingPlan, margin: float) -> bool:
    return plan.estimated <= (1 - margin) * plan.target.chip.usable
