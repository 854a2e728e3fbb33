"""The plan of a training run: the estimate, and what the TPU compiler reports."""

import dataclasses
from collections.abc import Callable

import jax

from llama_jax.config import Config
from llama_jax.data.loader import abstract_batch
from llama_jax.hardware.hlo import collectives
from llama_jax.planning.compile import Compiled, compile_program, target_mesh
from llama_jax.planning.memory import Memory, abstract_mesh, training_memory
from llama_jax.planning.speed import Speed, training_speed
from llama_jax.planning.targets import Target
from llama_jax.training.step import abstract_state, jit_train_step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A config with the memory and speed expected of its train step."""

    config: Config
    memory: Memory
    speed: Speed


Compiler = Callable[[Estimate, Target], Compiled]


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What is known about a train step on a target."""

    estimate: Estimate
    target: Target
    compiled: Compiled | None = None  # None: only estimated

    @property
    def config(self) -> Config:
        """The config of the run."""
        return self.estimate.config

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
        """The compiler's figure over the estimate; 1 without one."""
        ratio = self.total / self.estimate.memory.total
        if self.fits:
            return ratio
        # The compiler may refuse a program although it reports no more bytes than there are.
        return max(ratio, self.target.chip.usable / self.estimate.memory.total * (1 + 1e-6))

    @property
    def memory(self) -> Memory:
        """Bytes by kind: the compiler's total, divided as the estimate is."""
        estimated = self.estimate.memory
        if self.compiled is None:
            return estimated
        rest = self.compiled.total - estimated.parameters - estimated.optimizer
        activations = min(estimated.activations, rest)
        return dataclasses.replace(estimated, activations=activations, temporary=rest - activations)

    @property
    def speed(self) -> Speed:
        """The prediction, with the collectives of the compiled program where there is one."""
        if self.compiled is None or not self.compiled.fits:
            return self.estimate.speed
        devices = self.target.devices
        sent = sum(one.sent(devices) * one.times for one in collectives(self.compiled.text))
        return dataclasses.replace(self.estimate.speed, network=sent / (self.target.chip.link / 2))


def estimate(config: Config, target: Target, correction: float = 1.0) -> Estimate:
    """Return the estimate for a config as it is.

    Args:
      correction: see `training_memory`.

    Raises:
      UsageError: when it does not divide over the devices.
    """
    mesh = abstract_mesh(config.mesh, target.devices)
    memory = training_memory(config, mesh, target.chip, correction)
    return Estimate(config, memory, training_speed(config, mesh, target.chip, memory))


def plan_training(config: Config, target: Target, compiler: Compiler | None = None) -> TrainingPlan:
    """Return the plan of a config on a target.

    Args:
      compiler: such as `compile_training`, for TPUs; None: estimate only.

    Raises:
      UsageError: when the config does not divide over the devices.
    """
    estimated = estimate(config, target)
    return TrainingPlan(estimated, target, compiler(estimated, target) if compiler else None)


def compile_training(estimated: Estimate, target: Target) -> Compiled:
    """Compile the train step of a config for a TPU target."""
    config = estimated.config
    mesh = target_mesh(config.mesh, target)
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        step = jit_train_step(config, mesh)
        return compile_program(
            lambda: step.lower(state, abstract_batch(config)), estimated.memory.total
        )
