"""Ways to run a step, ranked: many by estimate, the best few by the compiler."""

import dataclasses

from llama_jax.config import Config
from llama_jax.planning.alternatives import Estimate, ranked
from llama_jax.planning.report import GIB, flags_of, spelled
from llama_jax.planning.targets import Target
from llama_jax.planning.tpu_compiler import Compiled
from llama_jax.planning.training_plan import compile_training

SHOWN = 10  # ways
COMPILED = 3  # of them, each for a minute or two


@dataclasses.dataclass(frozen=True)
class Found:
    """A way, and what the compiler says of it if it was asked."""

    way: Estimate
    compiled: Compiled | None

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
            found.append(Found(way, compiled))
    return found


def search_report(config: Config, target: Target, found: list[Found]) -> str:
    """The ways as a table, with the flags that choose each."""
    if not found:
        return (
            f"{target.description}\n"
            "no mesh, microbatch or remat policy fits this batch, by estimate; without --search the"
            " plan says whether another batch or bfloat16 moments would"
        )
    lines = [target.description, f"{'GiB a chip':<16}{'a step, predicted':<20}flags"]
    for one in found:
        source = "compiled" if one.compiled else "estimated"
        size = f"{one.total / GIB:.2f} {source}"
        speed = f"{spelled(one.way.speed.seconds)} ({one.way.speed.bottleneck})"
        lines.append(f"{size:<16}{speed:<20}{flags_of(one.way.config, config, target)}")
    return "\n".join(lines)
