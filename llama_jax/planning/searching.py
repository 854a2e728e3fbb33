"""Ways to run a step, ranked: many by estimate, the best few by the compiler."""

import dataclasses

from llama_jax.config import Config
from llama_jax.planning.alternatives import Estimate, cheapest_that_fits, ranked
from llama_jax.planning.report import GIB, cheapest_lines, flags_of, spelled
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target
from llama_jax.planning.tpu_compiler import Compiled
from llama_jax.planning.training_plan import compile_training, with_exchanges

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
