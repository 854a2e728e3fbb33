"""The loop of a run: step, report, validate, save, until the last step or a stop signal.

What a step computes is in `training.step`; this module decides when. A checkpoint is written before
anything that only informs, such as a sample, so that no failure there can cost training.
"""

import dataclasses
import math
import shlex
import time
from collections.abc import Callable
from types import TracebackType

import jax
import jax.numpy as jnp

from llama_jax.checkpoints.load import BASE
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.config import Config
from llama_jax.data.loader import Batch, abstract_batch
from llama_jax.errors import NonFiniteLossError, UserError, as_started, is_out_of_memory, warn
from llama_jax.training.metrics import (
    Console,
    MetricsFile,
    Reporter,
    StepClock,
    format_duration,
    format_metrics,
)
from llama_jax.training.plot import draw
from llama_jax.training.profiling import Profiler, Window
from llama_jax.training.session import Session, open_session
from llama_jax.training.step import StepMetrics, TrainState
from llama_jax.training.summary import run_summary, versions
from llama_jax.training.validation import sample, validation_metrics

SECONDS_BETWEEN_PICTURES = 30.0  # at least: drawing takes about one


def fit(
    config: Config, profile: Window | None = None, devices: list[jax.Device] | None = None
) -> int:
    """Train as the config says, resuming from the newest checkpoint; return the exit code.

    It is 0 at the end, and 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP. Inside
    `distributed.processes.joined` this process does its part of the run.

    Args:
      profile: steps to trace.
      devices: to train on; by default all.

    Raises:
      UsageError: if the config does not fit the devices or the data.
      UserError: if data or folder cannot be used, a checkpoint cannot be written, or processes
        disagree.
      NonFiniteLossError: if a loss or gradient is not finite; the last good state is saved.
      OutOfMemoryError: if the devices have not enough memory.
    """
    with open_session(config, profile, devices) as session:
        return train(session)


def train(session: Session) -> int:
    """Take all steps that are left; return the exit code as `fit` does, with its errors."""
    with Trainer(session) as trainer:
        return trainer.run()


class Trainer:
    """The loop of one session, and what it writes to."""

    def __init__(self, session: Session):
        self.session, self.config, self.folder = session, session.config, session.folder
        start = session.start
        self.state, self.step = start.state, start.step
        self.saved_step, self.best_loss = start.saved_step, start.best_loss
        self.has_validated = False  # in this session
        self.draws, self.drawn = True, session.opened  # whether, and when last
        session.validation_batches()  # refuses now, not hours later, a text that is too short
        self.batches = session.batches(self.step)
        self.writer = CheckpointWriter(self.folder, self.config.run.keep_last)
        self.console = Console(self.config.optimizer.steps, self.step)
        self.profiler = Profiler(session.profile, self.folder, self.console.line)
        self.metrics = MetricsFile(self.folder, self.config)
        self.clock = StepClock(session.opened, self.metrics.earlier_sessions(self.step))
        devices = list(session.mesh.devices.flat)
        self.reporter = Reporter(self.config, devices, self.metrics, self.console, self.clock)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Finish the checkpoint being written and close console and files."""
        self.profiler.close(self.step)
        if hasattr(self.batches, "close"):
            self.batches.close()
        self.console.close()
        self.metrics.close()
        try:
            self.writer.close()
        except UserError:
            if error is None:  # else the first error is the one to report
                raise

    def run(self) -> int:
        """Take all steps that are left; return the exit code."""
        session, total = self.session, self.config.optimizer.steps
        for line in run_summary(self.config, session.mesh, session.data, self.folder, self.step):
            self.console.line(line)
        self._report_changes()
        if self.step >= total:
            self.console.line(f"finished: all {total:,} steps were made already")
            return 0
        step_function = self._compile()
        if self.step == 0 and self.config.run.init_from:
            self._validate()  # what the checkpoint can do that training starts from
            self._sample()
        self.profiler.skip_to(self.step)
        self.clock.start()
        while self.step < total and not session.stop.requested():
            self._profile_if_due()
            with self.profiler.step(self.step + 1):
                self.state, metrics = step_function(self.state, next(self.batches))
                self.reporter.add(metrics)
            self.step += 1
            self._profile_if_due()
            self._follow_up(is_last=self.step == total)
            self.writer.raise_if_failed()
        if session.stop.requested():
            return self._leave()
        with self.console.waiting("saving"):
            self.writer.wait()
        self._finish(total)
        return 0

    def _report_changes(self) -> None:
        """Report the settings that differ from those of the session before."""
        changes = self.session.changes
        for key, (old, new) in changes.items():
            self.console.line(f"changed   {key} from {old!r} to {new!r} after step {self.step:,}")
        if changes:
            self.metrics.write({"step": self.step, "changed": changes})

    def _compile(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """Compile the train step for the shapes of this run."""
        started = time.perf_counter()
        self.console.line("compiling the train step")
        with self.console.waiting("compiling"):
            lowered = self.session.programs.train.lower(self.state, abstract_batch(self.config))
            compiled = lowered.compile()
        self.console.line(f"compiled  in {time.perf_counter() - started:.1f} s")
        return compiled

    def _profile_if_due(self) -> None:
        """Start or stop a trace between two steps."""
        if self.profiler.is_due(self.step):
            jax.block_until_ready(self.state)  # queued steps must not reach into the trace
            with self.clock:
                self.profiler.toggle(self.step)

    def _follow_up(self, is_last: bool) -> None:
        """Report, validate, save and sample where it is due."""
        run, loss = self.config.run, math.inf
        is_epoch = run.eval_epochs and self.step % self.session.epoch == 0
        is_validated = self.step % run.eval_every == 0 or is_epoch or is_last
        is_saved = self.step % run.save_every == 0 or is_last
        if is_validated or is_saved or self.step % run.log_every == 0:
            self._report()  # what is validated or saved is known to be finite
        if is_validated:
            with self.clock:
                loss = self._validate()
        is_best = loss < self.best_loss  # False for NaN
        if is_best:
            self.best_loss = loss
        if is_best or is_saved:
            with self.clock:
                self._save(loss)
        if is_validated:
            with self.clock:
                self._sample()
        is_old = time.perf_counter() - self.drawn > SECONDS_BETWEEN_PICTURES
        if (is_validated or is_saved) and is_old and not is_last:
            with self.clock:
                self._draw()

    def _validate(self) -> float:
        """Report the validation loss and return it; infinity after a stop signal."""
        if not self.has_validated:
            self.console.line("compiling the evaluation step")
        self.has_validated = True
        with self.console.waiting("validating"):
            metrics = validation_metrics(self.session, self.state)
        if metrics is None:
            return math.inf
        if self.config.optimizer.loss == "next_token":
            metrics = {
                source: {"perplexity": math.exp(min(means["loss"], 700))} | means
                for source, means in metrics.items()
            }
        overall = metrics.pop("")
        sources = metrics if len(metrics) > 1 else {}
        by_source = {
            f"validation_{name}/{source}": value
            for source, means in sources.items()
            for name, value in means.items()
        }
        loss = overall.pop("loss")
        self.metrics.write({"step": self.step, "validation_loss": loss} | overall | by_source)
        fields = [f"step {self.step}", f"validation loss {loss:.4f}", *format_metrics(overall)]
        self.console.line("  ".join(fields + ["best so far"] * (loss < self.best_loss)))
        for source, means in sources.items():
            fields = [f"loss {means.pop('loss'):.4f}", *format_metrics(means), source]
            self.console.line(f"  of it {'  '.join(fields)}")
        return loss

    def _report(self) -> None:
        """Report the pending steps; stop the run if one of them was not finite."""
        if failed := self.reporter.report(self.step):
            self._stop_before(*failed)

    def _stop_before(self, step: int, metrics: StepMetrics) -> None:
        """End the run at a step whose loss or gradient was not finite."""
        self.step, last_good = step - 1, step - 1
        self.state = dataclasses.replace(self.state, healthy=jnp.bool(True))
        if self.saved_step != last_good:
            self._save(math.inf)
        self.writer.wait()
        raise NonFiniteLossError(
            f"step {step} has loss {metrics.loss} and gradient norm {metrics.gradient_norm};"
            f" stopped before its update, with step {last_good} saved in {self.folder}; resume with"
            " a lower --config.optimizer.learning_rate"
        )

    def _save(self, validation_loss: float) -> None:
        """Start to write a checkpoint of the current state."""
        best = {} if math.isinf(self.best_loss) else {"best_validation_loss": self.best_loss}
        base = {BASE: self.session.base} if self.session.base else {}
        self.writer.save(
            self.step,
            self.state.trainable,
            self.state.optimizer,
            {"data": self.session.data.fingerprint, "versions": versions()} | base | best,
            validation_loss,
        )
        self.saved_step = self.step

    def _sample(self) -> None:
        """Show what the model writes now, unless samples are off or the run is to stop.

        A failure is a warning, since it costs no training.
        """
        is_wanted = self.config.run.sample_tokens and jax.process_count() == 1
        if not is_wanted or self.session.stop.requested():
            return
        try:
            with self.console.waiting("sampling"):
                text = sample(self.session, self.state, seed=self.step)
            self.console.line(text)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            warn(f"no sample at step {self.step}: {error!r}; training goes on")

    def _draw(self) -> None:
        """Draw the losses; a failure is one warning, since it costs no training."""
        if jax.process_index() == 0 and self.draws:
            try:
                draw(self.folder)
            except Exception as error:
                self.draws = False
                warn(f"the loss plot could not be drawn: {error!r}; training goes on without it")
        self.drawn = time.perf_counter()

    def _leave(self) -> int:
        """Save the current step and say how to go on."""
        self._report()
        if self.saved_step != self.step:
            self._save(math.inf)
        self.writer.wait()
        self.console.line(
            f"stopped at step {self.step:,}, saved in {self.folder};"
            " the same command goes on from there"
        )
        return self.session.stop.exit_code

    def _finish(self, total: int) -> None:
        """Draw the losses and say how to sample."""
        self._draw()
        prompt, is_chat = self.config.run.sample_prompt, bool(self.session.data.first.chat_template)
        words = ["--ckpt", str(self.folder)]
        words += ["--chat"] if is_chat else ["--prompt", prompt] if prompt else []
        command = f"{as_started('python sample.py')} {shlex.join(words)}"
        self.console.line(
            f"finished {total:,} steps in {format_duration(self.clock.wall)}, goodput"
            f" {self.clock.summary}; sample with: {command}"
        )
