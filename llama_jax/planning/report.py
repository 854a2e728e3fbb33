"""Plans as text: GiB by kind, whether they fit, collectives, speed, alternatives; and the table."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.config import Config, MeshConfig
from llama_jax.distributed.mesh import MESH_AXES
from llama_jax.errors import UsageError
from llama_jax.hardware.accelerators import GIB, GPU_FRACTION
from llama_jax.hardware.hlo import collectives
from llama_jax.planning.compile import Compiled
from llama_jax.planning.decoding import DecodingPlan
from llama_jax.planning.memory import (
    abstract_mesh,
    attention_backend,
    remat_policy,
    sequences_per_device,
)
from llama_jax.planning.search import (
    MARGIN,
    cheapest_decoding_change,
    cheapest_that_fits,
    largest_decoding_batch,
    largest_microbatch,
)
from llama_jax.planning.targets import Target, parse_target
from llama_jax.planning.training import Estimate, TrainingPlan, estimate

KINDS = ("parameters", "optimizer", "activations", "temporary")
COLUMN = 11  # characters of a column of figures
PREDICTED = "predicted from data sheet peaks: bound by"


def training_report(plan: TrainingPlan) -> str:
    """Return the report of a training plan, several lines."""
    config, target, speed = plan.config, plan.target, plan.speed
    mesh, remat = abstract_mesh(config.mesh, target.devices), remat_policy(config, target.chip)
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    microbatches = counted(config.optimizer.accumulation_steps, "microbatch", "es")
    columns = {"estimated": plan.estimate.memory}
    if plan.compiled:
        columns = {"compiled": plan.memory, **columns}
    rows = {kind: [getattr(memory, kind) for memory in columns.values()] for kind in KINDS}
    parts = [
        target.description,
        f"step: {config.data.batch_size} sequences × {config.data.sequence_length} tokens,"
        f" {microbatches} of {sequences_per_device(config, mesh)} per chip; {sizes}"
        f"{', sequence parallel' if config.mesh.sequence else ''}, remat {remat}",
        f"attention {attention_backend(config, target.chip)},"
        f" {_parameters(config)}, moments {config.optimizer.moments_dtype},"
        f" arithmetic {config.model.compute_dtype}",
        "",
        *_memory_table(list(columns), rows),
        *verdict(plan),
        "",
        *collective_lines(plan.compiled, target.devices),
        f"{PREDICTED} {speed.bottleneck}, at least {format_seconds(speed.seconds)} per step",
        f"  arithmetic {format_seconds(speed.arithmetic)}, memory {format_seconds(speed.memory)},"
        f" network {format_seconds(speed.network)}",
    ]
    if remat == "offload":
        parts += ["  transfers of run.remat=offload to and from the host are not counted"]
    return "\n".join([*parts, "", *_advice_lines(plan)])


def _parameters(config: Config) -> str:
    """Return how a run stores its parameters, such as "parameters float32"."""
    lora = config.lora
    if not lora.rank:
        return "parameters float32"
    base = config.model.compute_dtype if lora.base == "compute" else lora.base
    double = " with double quantization" if lora.double_quantization else ""
    return f"adapters of rank {lora.rank} float32, frozen weights {base}{double}"


def figures(plan: TrainingPlan | DecodingPlan) -> dict[str, Any]:
    """Return a plan's figures as JSON can hold them: bytes of one device, and seconds.

    The seconds are of a step, or of a token of each sequence.
    """
    if isinstance(plan, DecodingPlan):
        kinds = {"weights": plan.weights, "cache": plan.cache}
        kinds["temporary"] = plan.total - sum(kinds.values())
    else:
        kinds = dataclasses.asdict(plan.memory)
    return {
        "target": plan.target.name,
        "devices": plan.target.devices,
        "compiled": plan.compiled is not None,
        "fits": plan.fits,
        "bytes": {**kinds, "total": plan.total, "usable": plan.target.chip.usable},
        "seconds": plan.speed.seconds,
        "bottleneck": plan.speed.bottleneck,
    }


def _memory_table(columns: list[str], rows: dict[str, list[float]]) -> list[str]:
    """Return bytes by kind as columns of GiB that end with their totals."""
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    digits = 2 if max(totals) >= GIB else 4
    lines = [f"{'GiB per chip':<14}" + "".join(f"{name:>{COLUMN}}" for name in columns)]
    for kind, sizes in {**rows, "total": totals}.items():
        figures = "".join(f"{size / GIB:>{COLUMN}.{digits}f}" for size in sizes)
        lines.append(f"{kind:<14}{figures}")
    return lines


def verdict(plan: TrainingPlan | DecodingPlan) -> list[str]:
    """Return whether a plan fits, by how much, and a warning where an estimate may be wrong."""
    chip = plan.target.chip
    by_default = "" if chip.is_tpu else f", the {GPU_FRACTION:.0%} that JAX takes by default"
    usable = f"{chip.usable / GIB:.2f} GiB usable of {chip.memory / GIB:g} GiB{by_default}"
    left = chip.usable - plan.total
    if not plan.fits:
        return [f"does not fit: {-left / GIB:.2f} GiB more than the {usable}"]
    lines = [f"fits: {left / GIB:.2f} GiB left ({left / chip.usable:.0%}) of {usable}"]
    if plan.compiled is None and left < MARGIN * chip.usable:
        remedy = "compile it, without --fast" if chip.is_tpu else "try it before a long run"
        lines += [f"  that is less than the estimate's error of up to {MARGIN:.0%}: {remedy}"]
    return lines


def collective_lines(compiled: Compiled | None, devices: int) -> list[str]:
    """Return what the compiled program sends between chips; nothing if there is none."""
    if compiled is None or not compiled.fits:
        return []
    sent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for one in collectives(compiled.text):
        sent[one.kind] += one.sent(devices) * one.times
        times[one.kind] += one.times
    kinds = [f"{times[kind]:,} {kind} ({sent[kind] / GIB:.2f} GiB)" for kind in sent]
    return [f"collectives, and GiB sent per chip: {', '.join(kinds) or 'none'}"]


def format_seconds(seconds: float) -> str:
    """Return a duration with three significant digits and its unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Return a number of things, such as "1 microbatch" or "1,024 sequences"."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _advice_lines(plan: TrainingPlan) -> list[str]:
    config, target, source = plan.config, plan.target, "by estimate"
    if plan.compiled:
        source += f" × {plan.correction:.2f}, the compiler's figure over the estimate"
    largest = largest_microbatch(config, target, plan.correction)
    lines = [
        f"largest microbatch that fits, {source}: {counted(largest, 'sequence')} over all chips;"
        " a batch may be any multiple of it"
        if largest
        else f"with these settings not one sequence per chip fits, {source}"
    ]
    if plan.fits:
        return lines
    cheapest = cheapest_that_fits(config, target, max(1.0, plan.correction))
    return [*lines, *_cheapest_lines(cheapest, config, target)]


def _cheapest_lines(cheapest: Estimate | None, config: Config, target: Target) -> list[str]:
    """Return what fits instead of a config, with its flags."""
    if cheapest is None:
        return ["no mesh, microbatch, remat policy or batch fits; use more or larger chips"]
    batch, seconds = cheapest.config.data.batch_size, format_seconds(cheapest.speed.seconds)
    of = "" if batch == config.data.batch_size else f" of only {counted(batch, 'sequence')}"
    return [
        f"cheapest that fits, by estimate: {cheapest.memory.total / GIB:.2f} GiB,"
        f" {seconds} per step{of} predicted",
        f"  {flags_of(cheapest.config, config, target)}",
    ]


def flags_of(new: Config, old: Config, target: Target) -> str:
    """Return the command-line flags that turn one config into another."""
    settings = [_settings(config, target.devices) for config in (new, old)]
    changed = dict(settings[0].items() - settings[1].items())
    flags = [f"--config.{key}={changed[key]}" for key in settings[0] if key in changed]
    return " ".join(flags) or "no change"


def _settings(config: Config, devices: int) -> dict[str, object]:
    """Return the settings that alternatives change, by flag."""
    try:
        sizes = dict(abstract_mesh(config.mesh, devices).shape)
    except UsageError:  # a mesh for another number of devices
        sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    return {
        **{f"mesh.{axis}": size for axis, size in sizes.items()},
        "mesh.sequence": config.mesh.sequence,
        "run.remat": config.run.remat,
        "data.batch_size": config.data.batch_size,
        "optimizer.accumulation_steps": config.optimizer.accumulation_steps,
        "optimizer.moments_dtype": config.optimizer.moments_dtype,
    }


def search_report(config: Config, target: Target, found: list[TrainingPlan]) -> str:
    """Return the alternatives that a search found as a table, with the flags of each."""
    if not found:
        none = "no mesh, microbatch or remat policy fits this batch with moments as they are"
        other = _cheapest_lines(cheapest_that_fits(config, target), config, target)
        return "\n".join([target.description, f"{none}, by estimate", *other])
    rows = [("GiB per chip", "per step, predicted", "flags")]
    for plan in found:
        size = f"{plan.total / GIB:.2f} {'compiled' if plan.compiled else 'estimated'}"
        speed = f"{format_seconds(plan.speed.seconds)} ({plan.speed.bottleneck})"
        rows.append((size, speed, flags_of(plan.config, config, target)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{size:<{widths[0]}}  {speed:<{widths[1]}}  {flags}" for size, speed, flags in rows]
    return "\n".join([target.description, *lines])


def decoding_report(plan: DecodingPlan) -> str:
    """Return the report of a decoding plan, several lines."""
    options, model, speed = plan.options, plan.model, plan.speed
    replicated = f" (replicated: {', '.join(plan.replicated)})" if plan.replicated else ""
    totals = {"estimated": plan.estimated}
    if plan.compiled:
        totals = {"compiled": plan.total, **totals}
    rows = {  # weights and cache are known exactly
        "weights": [plan.weights] * len(totals),
        "cache": [plan.cache] * len(totals),
        "temporary": [total - plan.weights - plan.cache for total in totals.values()],
    }
    parts = [
        plan.target.description,
        f"decoding: {counted(options.batch, 'sequence')} × {model.context_length} tokens;"
        f" weights {options.quantize or model.compute_dtype} over tensor {plan.target.devices}"
        f"{replicated}, cache {options.cache_dtype or model.compute_dtype}",
        "",
        *_memory_table(list(totals), rows),
        *verdict(plan),
        *([] if plan.fits else _decoding_advice(plan)),
        "",
        *collective_lines(plan.compiled, plan.target.devices),
        f"{PREDICTED} {speed.bottleneck}, at least {format_seconds(speed.seconds)} per token of"
        f" each sequence, at most {options.batch / speed.seconds:,.0f} tokens/s in all",
    ]
    return "\n".join(parts)


def _decoding_advice(plan: DecodingPlan) -> list[str]:
    """Return what fits instead: fewer sequences, and the smallest change that keeps them all."""
    largest = largest_decoding_batch(plan)
    lines = [
        f"largest batch that fits, by estimate: {counted(largest, 'sequence')}"
        if largest
        else "with these settings not one sequence fits, by estimate"
    ]
    found = cheapest_decoding_change(plan)
    if found is None:
        return [*lines, "no shorter context or quantization fits; use more or larger chips"]
    old, new = dataclasses.asdict(plan.options), dataclasses.asdict(found.options)
    flags = [f"--{name}={value}" for name, value in new.items() if value != old[name]]
    change = f"{' '.join(flags)}, {found.estimated / GIB:.2f} GiB"
    return [*lines, f"cheapest change that fits, by estimate: {change}"]


# The Markdown table of which config fits where: estimates for every config and target.

TARGETS = ("v5e-1", "v5e-8", "v6e-1", "v6e-8", "v5p-64", "H200-1", "H200-8")
CAPTION = """\
GiB per chip, by estimate (`python plan.py --table`), of a train step with the config's own batch,
parameters and batch sharded over all chips (`mesh.fsdp`), in as many of its microbatches as divide.
**Bold** fits. Otherwise, after the arrow, the cheapest alternative that leaves 15 % free: another
mesh, microbatch or remat policy; † with moments in bfloat16, ‡ with a smaller batch too; `plan.py`
gives its flags. – : the batch has fewer sequences than there are chips."""


def table(configs: Mapping[str, Config], targets: Sequence[str] = TARGETS) -> str:
    """Return the table for configs by name, with its caption."""
    parsed = [parse_target(name) for name in targets]
    rows = [["config", *targets], ["---"] * (len(targets) + 1)]
    rows += [
        [f"`{name}`", *(cell(config, target) for target in parsed)]
        for name, config in configs.items()
    ]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", CAPTION])


def cell(config: Config, target: Target) -> str:
    """Return the table's entry for a config on a target."""
    sharded = over_all_chips(config, target.devices)
    if sharded is None:
        return "–"
    try:
        total = estimate(sharded, target).memory.total
    except UsageError:
        return "–"
    if total <= target.chip.usable:
        return f"**{_format_gib(total)}**"
    other = cheapest_that_fits(sharded, target)
    if other is None:
        return _format_gib(total)
    is_narrow = other.config.optimizer.moments_dtype != sharded.optimizer.moments_dtype
    is_smaller = other.config.data.batch_size != sharded.data.batch_size
    mark = "‡" if is_smaller else "†" if is_narrow else ""
    return f"{_format_gib(total)} → **{_format_gib(other.memory.total)}**{mark}"


def over_all_chips(config: Config, devices: int) -> Config | None:
    """Return the config with fsdp over all devices and the most of its microbatches that divide.

    None where its batch does not divide over the devices.
    """
    batch, count = config.data.batch_size, config.optimizer.accumulation_steps
    counts = [n for n in range(1, count + 1) if count % n == 0 and batch % (n * devices) == 0]
    if not counts:
        return None
    mesh = MeshConfig(data=1, fsdp=devices, tensor=1)
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=max(counts))
    return dataclasses.replace(config, mesh=mesh, optimizer=optimizer)


def _format_gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}"
