"""Where a run goes on: the newest whole checkpoint's state, or the state before the first step."""

import dataclasses
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoints.restore import restore_newest
from llama_jax.checkpoints.run_folder import METRICS
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.config import Config
from llama_jax.data.loader import Batch, abstract_batch, load_training_batches
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.mesh import placed
from llama_jax.distributed.preemption import StopSignal
from llama_jax.errors import NonFiniteLossError, UserError
from llama_jax.training.metrics import (
    Console,
    MetricsFile,
    Reporter,
    StepClock,
    earlier_sittings,
    spelled_duration,
    warn,
)
from llama_jax.training.plot import draw
from llama_jax.training.profiling import Profiler, Window
from llama_jax.training.step import (
    Programs,
    StepMetrics,
    TrainState,
    abstract_state,
    jit_init,
    state_shardings,
)
from llama_jax.training.summary import introduction, versions
from llama_jax.training.validation import Validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a sitting begins with."""

    state: TrainState
    begun: float  # when, by `time.perf_counter`
    step: int = 0  # updates made so far
    saved_step: int = -1  # that of the newest checkpoint; -1: there is none
    best_loss: float = math.inf  # of all validations so far


def restore_or_begin(config: Config, folder: Path, data: TokenFolder, mesh: Mesh) -> Beginning:
    """The newest whole checkpoint's state on this mesh, or the state before the first step.

    Raises:
      UserError: when no checkpoint is whole, or the data are not those it was trained on.
    """
    begun, places = time.perf_counter(), state_shardings(config, mesh)
    wanted = placed(abstract_state(config), places)
    items = {"model": wanted.model, "optimizer": wanted.optimizer}
    restored = restore_newest(folder, items, report=warn, set_aside=True)
    if restored is None:
        return Beginning(state=jit_init(config, mesh)(), begun=begun)
    if restored.meta.get("data") != data.fingerprint and not config.data.allow_change:
        raise UserError(
            f"the data in {data.path} are not those that step {restored.step} of"
            f" {folder} was trained on; restore them, or accept the change with"
            " --config.data.allow_change=true"
        )
    step, healthy = jax.device_put(
        (jnp.int32(restored.step), jnp.bool(True)), (places.step, places.healthy)
    )
    model, optimizer = restored.trees["model"], restored.trees["optimizer"]
    return Beginning(
        state=TrainState(step, healthy, model, optimizer),
        begun=begun,
        step=restored.step,
        saved_step=restored.step,
        best_loss=restored.meta.get("best_validation_loss", math.inf),
    )


# One sitting of a run: step, report, validate, save, until the end or a signal.
#
# All that a step computes is in `train_step`; this file decides when. `training` brings it what it
# works on: data, folder, mesh.


class Trainer:
    """One sitting of a run."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        data: TokenFolder,
        mesh: Mesh,
        programs: Programs,
        stop: StopSignal,
        metrics: MetricsFile,
        beginning: Beginning,
        profile: Window | None = None,
    ):
        self.config, self.folder, self.data, self.mesh = config, folder, data, mesh
        self.train_step, self.stop, self.metrics = programs.train, stop, metrics
        self.state, self.step = beginning.state, beginning.step
        self.saved_step, self.best_loss = beginning.saved_step, beginning.best_loss
        self.batches = load_training_batches(config, data, mesh, self.step)
        self.validation = Validation(config, data, mesh, programs.evaluate, stop)
        self.writer = CheckpointWriter(folder, config.run.keep_last)
        self.console = Console(config.optimizer.steps, self.step)
        self.profiler = Profiler(profile, folder, self.console.line)
        earlier = earlier_sittings(folder / METRICS, self.step)
        self.clock = StepClock(beginning.begun, earlier)
        devices = list(mesh.devices.flat)
        self.reporter = Reporter(config, devices, metrics, self.console, self.clock)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        """Let go of console and files; what is being saved is finished first."""
        self.profiler.close(self.step)
        self.batches.close()
        self.console.close()
        try:
            self.writer.close()
        except UserError:
            if error is None:  # else the first error is the one to tell
                raise

    def run(self) -> int:
        """Take all steps that are left; the exit code."""
        total = self.config.optimizer.steps
        for line in introduction(self.config, self.mesh, self.data, self.folder, self.step):
            self.console.line(line)
        if self.step >= total:
            self.console.line(f"finished: all {total:,} steps were made already")
            return 0
        step_function = self._compile()
        self.profiler.skip_to(self.step)
        self.clock.start()
        while self.step < total and not self.stop.requested():
            self._profile_if_due()
            with self.profiler.step(self.step + 1):
                self.state, metrics = step_function(self.state, next(self.batches))
                self.reporter.add(metrics)
            self.step += 1
            self._profile_if_due()
            self._follow_up(is_last=self.step == total)
        if self.stop.requested():
            return self._leave()
        self.writer.wait()
        if jax.process_index() == 0:
            draw(self.folder)
        prompt = self.config.run.sample_prompt
        words = ["python", "sample.py", "--ckpt", str(self.folder)]
        words += ["--prompt", prompt] if prompt else []
        self.console.line(
            f"finished {total:,} steps in {spelled_duration(self.clock.wall)}, goodput"
            f" {self.clock.summary}; sample with: {shlex.join(words)}"
        )
        return 0

    def _profile_if_due(self) -> None:
        """Begin or end a trace between two steps."""
        if self.profiler.is_due(self.step):
            jax.block_until_ready(self.state)  # what was traced, or was not to be, is over
            with self.clock:
                self.profiler.turn(self.step)

    def _follow_up(self, is_last: bool) -> None:
        """Report, validate and save when it is time to."""
        run, loss = self.config.run, math.inf
        if self.step % run.log_every == 0 or is_last:
            self._report()
        if self.step % run.eval_every == 0 or is_last:
            self._report()
            with self.clock:
                loss = self._validate()
        if is_best := loss < self.best_loss:  # never true of NaN
            self.best_loss = loss
        if is_best or is_last or self.step % run.save_every == 0:
            self._report()  # never save a state that is not known to be finite
            with self.clock:
                self._save(loss)

    def _leave(self) -> int:
        """Save where the run stands and say how to go on."""
        self._report()
        if self.saved_step != self.step:
            self._save(math.inf)
        self.writer.wait()
        self.console.line(
            f"stopped at step {self.step:,}, saved in {self.folder};"
            " the same command goes on from there"
        )
        return self.stop.exit_code

    def _compile(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """The train step, compiled for the shapes of this run."""
        begun = time.perf_counter()
        compiled = self.train_step.lower(self.state, abstract_batch(self.config)).compile()
        self.console.line(f"compiled  in {time.perf_counter() - begun:.1f} s")
        return compiled

    def _report(self) -> None:
        """Tell what the pending steps told, and stop the run if one of them was not finite."""
        if spoilt := self.reporter.report(self.step):
            self._stop_before(*spoilt)

    def _stop_before(self, step: int, metrics: StepMetrics) -> None:
        """End the run at a step whose loss or gradient was not finite."""
        self.step, last_good = step - 1, step - 1
        self.state = dataclasses.replace(self.state, healthy=jnp.bool(True))
        if self.saved_step != last_good:
            self._save(math.inf)
        self.writer.wait()
        raise NonFiniteLossError(
            f"step {step} has loss {metrics.loss} and gradient norm {metrics.gradient_norm};"
            f" stopped before its update. The last good step is {last_good}, saved in"
            f" {self.folder}; try a lower --config.optimizer.learning_rate"
        )

    def _validate(self) -> float:
        """The mean validation loss in nats a token, said and written; inf if stopped meanwhile."""
        return self.validation(
            self.state.model, self.step, self.best_loss, self.console, self.metrics
        )

    def _save(self, validation_loss: float) -> None:
        """Begin to write a checkpoint of the state as it is."""
        best = {} if math.isinf(self.best_loss) else {"best_validation_loss": self.best_loss}
        self.writer.save(
            self.step,
            self.state.model,
            self.state.optimizer,
            {"data": self.data.fingerprint, "versions": versions()} | best,
            validation_loss,
        )
        self.saved_step = self.step
