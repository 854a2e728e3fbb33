"""The table of which config fits where, in Markdown: estimates for every config and target.

Each config keeps its batch. Where it does not fit as it is, the cheapest way that does is named.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from llama_jax.config import Config, MeshConfig
from llama_jax.errors import UsageError
from llama_jax.planning.alternatives import cheapest_that_fits, estimate
from llama_jax.planning.report import GIB
from llama_jax.planning.targets import Target, parse_target

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
