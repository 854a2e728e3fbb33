"""The plan of a training run: the estimate, what the compiler says, and what else would fit."""

import dataclasses

import jax

from llama_jax.config import Config
from llama_jax.data.batches import abstract_batch
from llama_jax.instruments.collectives import Collective, collectives
from llama_jax.planning.alternatives import Estimate, cheapest_that_fits, estimate, largest_batch
from llama_jax.planning.memory import Memory
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target
from llama_jax.planning.tpu_compiler import Compiled, compiled, target_mesh
from llama_jax.training.programs import jit_train_step
from llama_jax.training.train_step import abstract_state


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What is known of a run on a target."""

    config: Config
    target: Target
    estimate: Estimate
    compiled: Compiled | None  # None: only estimated
    largest_microbatch: int  # sequences over all devices, by estimate; 0: not one a device
    cheapest: Estimate | None  # the way that fits, of those with the same batch

    @property
    def total(self) -> float:
        """Bytes on one device: the compiler's figure where there is one."""
        return self.compiled.total if self.compiled else self.estimate.memory.total

    @property
    def fits(self) -> bool:
        """Whether one device holds them."""
        return self.total <= self.target.chip.usable and (not self.compiled or self.compiled.fits)

    @property
    def memory(self) -> Memory:
        """By kind: the compiler's sums, cut where the estimate cuts them."""
        guess = self.estimate.memory
        if self.compiled is None:
            return guess
        rest = self.compiled.total - guess.parameters - guess.optimizer
        kept = min(guess.activations, rest)
        return dataclasses.replace(guess, activations=kept, temporary=rest - kept)

    @property
    def speed(self) -> Speed:
        """The prediction, with the exchanges that the compiled program really makes."""
        if self.compiled is None or not self.compiled.fits:
            return self.estimate.speed
        sent = sum(c.sent(self.target.devices) * c.times for c in self.collectives)
        return dataclasses.replace(self.estimate.speed, network=sent / (self.target.chip.link / 2))

    @property
    def collectives(self) -> list[Collective]:
        """What the compiled program exchanges."""
        return collectives(self.compiled.text) if self.compiled else []


def plan_training(config: Config, target: Target, *, compile_it: bool) -> TrainingPlan:
    """The plan of a config on a target.

    Args:
      compile_it: have the TPU compiler make the real train step; GPUs have no such compiler here.

    Raises:
      UsageError: when the config does not divide over the devices.
      UserError: when the TPU compiler is needed and missing.
    """
    found = estimate(config, target)
    made = compile_training(found, target) if compile_it and target.chip.is_tpu else None
    plan = TrainingPlan(config, target, found, made, largest_batch(config, target), None)
    return (
        plan
        if plan.fits
        else dataclasses.replace(plan, cheapest=cheapest_that_fits(config, target))
    )


def compile_training(way: Estimate, target: Target) -> Compiled:
    """What the TPU compiler makes of a train step."""
    config = way.config
    mesh = target_mesh(config.mesh, target)
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        step = jit_train_step(config, mesh)
        return compiled(lambda: step.lower(state, abstract_batch(config)), way.memory.total)
