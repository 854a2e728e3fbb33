"""A plan as text, for people: GiB by kind, whether it fits, what is exchanged, what bounds it."""

from collections import Counter

from llama_jax.config import Config, MeshConfig
from llama_jax.errors import UsageError
from llama_jax.instruments.chips import GPU_SHARE
from llama_jax.instruments.collectives import collectives
from llama_jax.parallel.sharding import MESH_AXES
from llama_jax.planning.alternatives import MARGIN, Estimate
from llama_jax.planning.share import attention_backend, planned_mesh, require_rows
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target
from llama_jax.planning.tpu_compiler import Compiled
from llama_jax.planning.training_plan import TrainingPlan

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
