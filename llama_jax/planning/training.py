"""The plan of a training run: the estimate, what the compiler says, and what else would fit."""

import dataclasses

import jax

from llama_jax.config import Config
from llama_jax.data.loader import abstract_batch
from llama_jax.hardware.hlo import collectives
from llama_jax.planning.compile import Compiled, compiled, target_mesh
from llama_jax.planning.memory import Memory
from llama_jax.planning.search import Estimate, cheapest_that_fits, estimate, largest_batch
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target
from llama_jax.training.step import abstract_state, jit_train_step


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What is known of a run on a target."""

    config: Config
    target: Target
    estimate: Estimate
    compiled: Compiled | None  # None: only estimated
    # Sequences over all devices, by the estimate times `correction`; 0: not one a device.
    largest_microbatch: int
    # The fastest way that fits with a margin, of a smaller batch where it must; None: no way does,
    # or this one fits.
    cheapest: Estimate | None

    @property
    def total(self) -> float:
        """Bytes on one device: the compiler's figure where there is one."""
        return self.compiled.total if self.compiled else self.estimate.memory.total

    @property
    def fits(self) -> bool:
        """Whether one device holds them."""
        return self.total <= self.target.chip.usable and (not self.compiled or self.compiled.fits)

    @property
    def correction(self) -> float:
        """What the compiler says over what was estimated; 1 where it was not asked."""
        ratio = self.total / self.estimate.memory.total
        if self.fits:
            return ratio
        # One that the compiler refused may be said to take no more than there is.
        return max(ratio, self.target.chip.usable / self.estimate.memory.total * (1 + 1e-6))

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
        return with_exchanges(self.estimate.speed, self.compiled, self.target)


def with_exchanges(speed: Speed, made: Compiled | None, target: Target) -> Speed:
    """A prediction with what the compiled program really sends, where there is one."""
    if made is None or not made.fits:
        return speed
    sent = sum(one.sent(target.devices) * one.times for one in collectives(made.text))
    return dataclasses.replace(speed, network=sent / (target.chip.link / 2))


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
    plan = TrainingPlan(config, target, found, made, 0, None)
    most = largest_batch(config, _with_less(target, plan.correction))
    cheapest = None
    if not plan.fits:
        cheapest = cheapest_that_fits(config, _with_less(target, max(1.0, plan.correction)))
    return dataclasses.replace(plan, largest_microbatch=most, cheapest=cheapest)


def _with_less(target: Target, factor: float) -> Target:
    """The target as one finds it whose programs take so many times their estimate."""
    chip = dataclasses.replace(target.chip, usable=target.chip.usable / factor)
    return dataclasses.replace(target, chip=chip)


def compile_training(way: Estimate, target: Target) -> Compiled:
    """What the TPU compiler makes of a train step."""
    config = way.config
    mesh = target_mesh(config.mesh, target)
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        step = jit_train_step(config, mesh)
        return compiled(lambda: step.lower(state, abstract_batch(config)), way.memory.total)
