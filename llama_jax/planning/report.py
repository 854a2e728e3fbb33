"""A plan as text, for people: GiB by kind, whether it fits, what is exchanged, what bounds it."""

from collections import Counter

from llama_jax.config import Config
from llama_jax.instruments.chips import GPU_SHARE
from llama_jax.instruments.collectives import collectives
from llama_jax.planning.alternatives import Estimate
from llama_jax.planning.decoding_plan import DecodingPlan
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
        "",
        *exchange_lines(plan.compiled, plan.target.devices),
        *speed_lines(plan.speed),
        "",
        *_advice_lines(plan),
    ]
    return "\n".join(parts)


def _step_lines(config: Config, target: Target) -> list[str]:
    mesh = planned_mesh(config.mesh, target.devices)
    rows, length = require_rows(config, mesh), config.data.sequence_length
    return [
        f"step: {config.data.batch_size} sequences × {length} tokens,"
        f" {config.optimizer.accumulation_steps} microbatches of {rows} a chip;"
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
    guess, memory = plan.estimate.memory, plan.memory
    if plan.compiled is None:
        lines = [f"{'GiB a chip':<14}{'estimated':>10}"]
        lines += [f"{kind:<14}{getattr(guess, kind) / GIB:>10.2f}" for kind in KINDS]
        return [*lines, f"{'together':<14}{guess.total / GIB:>10.2f}"]
    lines = [f"{'GiB a chip':<14}{'compiled':>10}{'estimated':>11}"]
    for kind in KINDS:
        one, other = getattr(memory, kind) / GIB, getattr(guess, kind) / GIB
        lines.append(f"{kind:<14}{one:>10.2f}{other:>11.2f}")
    return [*lines, f"{'together':<14}{plan.total / GIB:>10.2f}{guess.total / GIB:>11.2f}"]


def verdict(total: float, target: Target, fits: bool) -> str:
    """Whether so many bytes fit, and by how much."""
    chip = target.chip
    by_default = "" if chip.is_tpu else f", which is the {GPU_SHARE:.0%} that JAX takes by default"
    share = f"{chip.usable / GIB:.2f} GiB usable of {chip.memory / GIB:g}{by_default}"
    left = (chip.usable - total) / GIB
    if fits:
        return f"fits: {left:.2f} GiB left ({left * GIB / chip.usable:.0%}) of {share}"
    return f"does not fit: {-left:.2f} GiB more than the {share}"


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


def spelled(seconds: float) -> str:
    """A time with three figures and its unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def _advice_lines(plan: TrainingPlan) -> list[str]:
    rows = plan.largest_microbatch
    largest = (
        f"largest microbatch that fits, by estimate: {rows} sequences; a batch may be any number"
        " of them"
        if rows
        else "this way not one sequence a chip fits, by estimate"
    )
    if plan.fits:
        return [largest]
    if plan.cheapest is None:
        return [
            largest,
            "no mesh, microbatch, remat policy or batch fits; use more or larger chips",
        ]
    return [
        largest,
        f"cheapest that fits, by estimate: {summary(plan.cheapest)}",
        f"  {flags_of(plan.cheapest.config, plan.config, plan.target)}",
    ]


def summary(way: Estimate) -> str:
    """What a way to run a step is expected to take."""
    seconds = spelled(way.speed.seconds)
    return f"{way.memory.total / GIB:.2f} GiB, {seconds} a step predicted"


def flags_of(new: Config, old: Config, target: Target) -> str:
    """The flags that make one config of another."""
    meshes = [planned_mesh(config.mesh, target.devices).shape for config in (new, old)]
    choices = {f"mesh.{axis}": [shape[axis] for shape in meshes] for axis in meshes[0]}
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


def decoding_report(plan: DecodingPlan) -> str:
    """The whole report of a sampling plan, several lines."""
    sampling, model, speed = plan.sampling, plan.model, plan.speed
    kinds = {"weights": plan.weights, "cache": plan.cache, "temporary": plan.temporary}
    lines = [
        plan.target.description,
        f"sampling: {sampling.batch} texts × {model.context_length} tokens;"
        f" weights {sampling.quantize or model.compute_dtype} over tensor {plan.target.devices},"
        f" cache {sampling.cache_dtype or model.compute_dtype}",
        "",
        f"{'GiB a chip':<14}{'estimated':>10}",
        *(f"{kind:<14}{size / GIB:>10.2f}" for kind, size in kinds.items()),
        f"{'together':<14}{plan.estimated / GIB:>10.2f}",
    ]
    if plan.compiled:
        lines.append(f"{'compiled':<14}{plan.compiled.total / GIB:>10.2f}")
    rate = sampling.batch / speed.seconds
    return "\n".join(
        [
            *lines,
            verdict(plan.total, plan.target, plan.fits),
            "",
            *exchange_lines(plan.compiled, plan.target.devices),
            f"predicted, at the data sheet's peaks: bound by {speed.bottleneck},"
            f" {spelled(speed.seconds)} a token of each text or more,"
            f" {rate:,.0f} tokens/s in all at most",
        ]
    )
