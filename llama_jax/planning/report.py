"""A plan as text, for people: GiB by kind, whether it fits, what is exchanged, what bounds it."""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.config import Config, MeshConfig
from llama_jax.distributed.mesh import MESH_AXES
from llama_jax.errors import UsageError
from llama_jax.hardware.accelerators import GPU_SHARE
from llama_jax.hardware.hlo import collectives
from llama_jax.planning.compile import Compiled
from llama_jax.planning.decoding import DecodingPlan, plan_decoding
from llama_jax.planning.memory import attention_backend, planned_mesh, require_rows
from llama_jax.planning.search import MARGIN, Estimate, cheapest_that_fits, estimate, ranked
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target, parse_target
from llama_jax.planning.training import TrainingPlan, compile_training, with_exchanges

GIB = 2**30
KINDS = ("parameters", "optimizer", "activations", "temporary")


def training_report(plan: TrainingPlan) -> str:
    """The whole report of a training plan, several lines."""
    parts = [
        plan.target.description,
        *_step_lines(plan.config, plan.target),
        "",
        *_memory_lines(plan),
        verdict(plan.total, plan.target, plan.fits),
        *doubt_lines(plan.total, plan.target, plan.fits and plan.compiled is None),
        "",
        *exchange_lines(plan.compiled, plan.target.devices),
        *speed_lines(plan.speed),
        *_offload_lines(plan.config),
        "",
        *_advice_lines(plan),
    ]
    return "\n".join(parts)


def _step_lines(config: Config, target: Target) -> list[str]:
    mesh = planned_mesh(config.mesh, target.devices)
    rows, length = require_rows(config, mesh), config.data.sequence_length
    return [
        f"step: {config.data.batch_size} sequences × {length} tokens,"
        f" {counted(config.optimizer.accumulation_steps, 'microbatch', 'es')} of {rows} a chip;"
        f" {way_line(config, target)}",
        f"attention {attention_backend(config, target.chip)},"
        f" parameters float32, moments {config.optimizer.moments_dtype},"
        f" arithmetic {config.model.compute_dtype}",
    ]


def way_line(config: Config, target: Target) -> str:
    """How a step is run, such as "data 1 × fsdp 8 × tensor 1, remat block"."""
    sizes = planned_mesh(config.mesh, target.devices).shape
    mesh = " × ".join(f"{name} {size}" for name, size in sizes.items())
    sequence = ", sequence parallel" if config.mesh.sequence else ""
    return f"{mesh}{sequence}, remat {config.run.remat}"


def _memory_lines(plan: TrainingPlan) -> list[str]:
    columns = {"estimated": plan.estimate.memory}
    if plan.compiled:
        columns = {"compiled": plan.memory, **columns}
    rows = {kind: [getattr(memory, kind) for memory in columns.values()] for kind in KINDS}
    return memory_table(list(columns), rows)


def memory_table(columns: list[str], rows: dict[str, list[float]]) -> list[str]:
    """Bytes by kind, in columns of GiB that end with their sums."""
    sums = [sum(column) for column in zip(*rows.values(), strict=True)]
    figures = 2 if max(sums) >= GIB else 4
    lines = [f"{'GiB a chip':<14}" + "".join(f"{name:>11}" for name in columns)]
    for kind, sizes in {**rows, "together": sums}.items():
        lines.append(f"{kind:<14}" + "".join(f"{size / GIB:>11.{figures}f}" for size in sizes))
    return lines


def verdict(total: float, target: Target, fits: bool) -> str:
    """Whether so many bytes fit, and by how much."""
    chip = target.chip
    by_default = "" if chip.is_tpu else f", which is the {GPU_SHARE:.0%} that JAX takes by default"
    share = f"{chip.usable / GIB:.2f} GiB usable of {chip.memory / GIB:g} GiB{by_default}"
    left = (chip.usable - total) / GIB
    if fits:
        return f"fits: {left:.2f} GiB left ({left * GIB / chip.usable:.0%}) of {share}"
    return f"does not fit: {-left:.2f} GiB more than the {share}"


def doubt_lines(total: float, target: Target, is_guess: bool) -> list[str]:
    """A warning where what is left is less than an estimate may be wrong by."""
    if not is_guess or total <= (1 - MARGIN) * target.chip.usable:
        return []
    remedy = (
        "ask the compiler, without --fast" if target.chip.is_tpu else "try it before a long run"
    )
    return [f"  that is less than the estimate's own error, up to {MARGIN:.0%}: {remedy}"]


def exchange_lines(compiled: Compiled | None, devices: int) -> list[str]:
    """What the compiled program sends between chips; nothing if there is none."""
    if compiled is None or not compiled.fits:
        return []
    sent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for one in collectives(compiled.text):
        sent[one.kind] += one.sent(devices) * one.times
        times[one.kind] += one.times
    told = [f"{times[kind]:,} {kind} ({sent[kind] / GIB:.2f} GiB)" for kind in sent]
    return [f"collectives, and what a chip sends: {', '.join(told) or 'none'}"]


def speed_lines(speed: Speed) -> list[str]:
    """The prediction of a step's time."""
    return [
        f"predicted, at the data sheet's peaks: bound by {speed.bottleneck},"
        f" {spelled(speed.seconds)} a step or more",
        f"  arithmetic {spelled(speed.arithmetic)}, memory {spelled(speed.memory)},"
        f" network {spelled(speed.network)}",
    ]


def _offload_lines(config: Config) -> list[str]:
    uncounted = "  what run.remat=offload exchanges with the host is not counted"
    return [uncounted] if config.run.remat == "offload" else []


def spelled(seconds: float) -> str:
    """A time with three figures and its unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def counted(number: int, noun: str, ending: str = "s") -> str:
    """A number of things, such as "1 microbatch" or "1,024 sequences"."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _advice_lines(plan: TrainingPlan) -> list[str]:
    most, source = plan.largest_microbatch, "by estimate"
    if plan.compiled:
        source += f" × {plan.correction:.2f}, which the compiler's figure is of it here"
    lines = [
        f"largest microbatch that fits, {source}: {counted(most, 'sequence')} on all chips"
        " together; a batch may be any multiple of it"
        if most
        else f"this way not one sequence a chip fits, {source}"
    ]
    return (
        lines if plan.fits else [*lines, *cheapest_lines(plan.cheapest, plan.config, plan.target)]
    )


def cheapest_lines(way: Estimate | None, config: Config, target: Target) -> list[str]:
    """What fits instead of a config, and its flags."""
    if way is None:
        return ["no mesh, microbatch, remat policy or batch fits; use more or larger chips"]
    batch, seconds = way.config.data.batch_size, spelled(way.speed.seconds)
    of = "" if batch == config.data.batch_size else f" of only {counted(batch, 'sequence')}"
    return [
        f"cheapest that fits, by estimate: {way.memory.total / GIB:.2f} GiB,"
        f" {seconds} a step{of} predicted",
        f"  {flags_of(way.config, config, target)}",
    ]


def flags_of(new: Config, old: Config, target: Target) -> str:
    """The flags that make one config of another."""
    meshes = [_sizes(config.mesh, target.devices) for config in (new, old)]
    choices: dict[str, list[object]] = {}
    choices |= {f"mesh.{axis}": [shape[axis] for shape in meshes] for axis in meshes[0]}
    choices |= {
        "mesh.sequence": [config.mesh.sequence for config in (new, old)],
        "run.remat": [config.run.remat for config in (new, old)],
        "data.batch_size": [config.data.batch_size for config in (new, old)],
        "optimizer.accumulation_steps": [
            config.optimizer.accumulation_steps for config in (new, old)
        ],
        "optimizer.moments_dtype": [config.optimizer.moments_dtype for config in (new, old)],
    }
    flags = [f"--config.{key}={now}" for key, (now, before) in choices.items() if now != before]
    return " ".join(flags) or "as it is"


def _sizes(mesh: MeshConfig, devices: int) -> dict[str, int]:
    """A mesh's sizes by axis, those of one for other devices as they are written."""
    try:
        return dict(planned_mesh(mesh, devices).shape)
    except UsageError:
        return {axis: getattr(mesh, axis) for axis in MESH_AXES}


# Other ways to sample on the same devices, by estimate: where a plan does not fit, what would.

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


# A plan for sampling as text: what it takes, whether it fits, and what would.


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


# Ways to run a step, ranked: many by estimate, the best few by the compiler.

SHOWN = 10  # ways
COMPILED = 3  # of them, each for a minute or two


@dataclasses.dataclass(frozen=True)
class Found:
    """A way, and what the compiler says of it if it was asked."""

    way: Estimate
    compiled: Compiled | None
    speed: Speed  # with the compiled program's exchanges, if there is one

    @property
    def total(self) -> float:
        """Bytes on one device."""
        return self.compiled.total if self.compiled else self.way.memory.total


def search(config: Config, target: Target, *, compile_it: bool) -> list[Found]:
    """The ways that fit, the fastest predicted first; those that the compiler refuses left out.

    Raises:
      UserError: when the TPU compiler is needed and missing.
    """
    found: list[Found] = []
    for way in ranked(config, target):
        if len(found) == SHOWN:
            break
        is_asked = compile_it and target.chip.is_tpu and len(found) < COMPILED
        compiled = compile_training(way, target) if is_asked else None
        if compiled is None or compiled.fits:
            found.append(Found(way, compiled, with_exchanges(way.speed, compiled, target)))
    return sorted(found, key=lambda one: float(f"{one.speed.seconds:.3g}"))  # else as ranked


def search_report(config: Config, target: Target, found: list[Found]) -> str:
    """The ways as a table, with the flags that choose each."""
    if not found:
        none = "no mesh, microbatch or remat policy fits this batch with moments as they are"
        other = cheapest_lines(cheapest_that_fits(config, target), config, target)
        return "\n".join([target.description, f"{none}, by estimate", *other])
    rows = [("GiB a chip", "a step, predicted", "flags")]
    for one in found:
        size = f"{one.total / GIB:.2f} {'compiled' if one.compiled else 'estimated'}"
        speed = f"{spelled(one.speed.seconds)} ({one.speed.bottleneck})"
        rows.append((size, speed, flags_of(one.way.config, config, target)))
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{size:<{wide[0]}}  {speed:<{wide[1]}}  {flags}" for size, speed, flags in rows]
    return "\n".join([target.description, *lines])


# The table of which config fits where, in Markdown: estimates for every config and target.
#
# Each config keeps its batch. Where it does not fit as it is, the cheapest way that does is named.

TARGETS = ("v5e-1", "v5e-8", "v6e-1", "v6e-8", "v5p-64", "H200-1", "H200-8")
CAPTION = """\
GiB a chip, by estimate (`python plan.py --table`), of a train step with the config's own batch, its
parameters and batch cut over all chips (`mesh.fsdp`), in as many of its microbatches as divide.
**Bold** fits. Otherwise, after the arrow, what the cheapest way takes that leaves 15 % free:
another mesh, microbatch or remat policy; † with moments in bfloat16, ‡ with a smaller batch too;
`plan.py` names its flags. – : the batch has fewer sequences than there are chips."""


def on_all_chips(config: Config, devices: int) -> Config | None:
    """The config cut over `devices` by fsdp, with the most microbatches it can have up to its own.

    None where its batch does not divide.
    """
    batch, most = config.data.batch_size, config.optimizer.accumulation_steps
    counts = [n for n in range(1, most + 1) if most % n == 0 and batch % (n * devices) == 0]
    if not counts:
        return None
    mesh = MeshConfig(data=1, fsdp=devices, tensor=1)
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=max(counts))
    return dataclasses.replace(config, mesh=mesh, optimizer=optimizer)


def cell(config: Config, target: Target) -> str:
    """What the table says of a config on a target."""
    way = on_all_chips(config, target.devices)
    if way is None:
        return "–"
    try:
        total = estimate(way, target).memory.total
    except UsageError:
        return "–"
    if total <= target.chip.usable:
        return f"**{_spelled(total)}**"
    other = cheapest_that_fits(way, target)
    if other is None:
        return _spelled(total)
    is_narrow = other.config.optimizer.moments_dtype != way.optimizer.moments_dtype
    is_smaller = other.config.data.batch_size != way.data.batch_size
    mark = "‡" if is_smaller else "†" if is_narrow else ""
    return f"{_spelled(total)} → **{_spelled(other.memory.total)}**{mark}"


def table(configs: Mapping[str, Config], targets: Sequence[str] = TARGETS) -> str:
    """The table for configs by name, caption last."""
    machines = [parse_target(name) for name in targets]
    lines = [_row("config", list(targets)), _row("---", ["---"] * len(machines))]
    lines += [
        _row(f"`{name}`", [cell(config, machine) for machine in machines])
        for name, config in configs.items()
    ]
    return "\n".join([*lines, "", CAPTION])


def _row(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _spelled(size: float) -> str:
    """GiB with as many figures as are worth it."""
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 100 else f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}"
