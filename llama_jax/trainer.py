"""One sitting of a run: step, report, validate, sample, save, until the end or a signal.

All that a step computes is in `train_step`; this file decides when. `training` brings it what it
works on: data, folder, mesh.
"""

import dataclasses
import math
import textwrap
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoint import CheckpointWriter, restore_newest
from llama_jax.config import Config
from llama_jax.data.batches import Batch, training_batches, validation_batches
from llama_jax.data.tokens import TokenFolder
from llama_jax.errors import NonFiniteLossError, UserError
from llama_jax.generation import Engine
from llama_jax.introduction import introduction, versions
from llama_jax.metrics import (
    Console,
    MetricsFile,
    StepClock,
    flops_per_token,
    peak_flops,
    spelled_duration,
    warn,
)
from llama_jax.model import unstack
from llama_jax.plot import draw
from llama_jax.sampling import make_sampler
from llama_jax.sharding import place_batch
from llama_jax.stop_signal import StopSignal
from llama_jax.text import stop_ids, stream
from llama_jax.tokenizer import Tokenizer
from llama_jax.train_step import (
    StepMetrics,
    TrainState,
    init_state,
    jit_evaluation_step,
    jit_init,
    jit_train_step,
    state_shardings,
)


class Trainer:
    """One sitting of a run."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        data: TokenFolder,
        mesh: Mesh,
        stop: StopSignal,
        metrics: MetricsFile,
    ):
        self.config, self.folder, self.data, self.mesh = config, folder, data, mesh
        self.stop, self.metrics = stop, metrics
        self.tokenizer = Tokenizer(data.tokenizer_path)
        self.best_loss = math.inf
        self.evaluation_step = jit_evaluation_step(config, mesh)
        self.saved_step = -1  # none yet
        self.state, self.step = self._restore_or_begin()
        self.batches = self._training_batches()
        self._validation_batches()  # a text too short to validate on is found now, not hours later
        self.writer = CheckpointWriter(folder, config.run.keep_last)
        self.console = Console(config.optimizer.steps, self.step)
        self.clock = StepClock()
        self.pending: list[StepMetrics] = []  # of steps not reported yet, still on the device

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        """Let go of console and files; what is being saved is finished first."""
        self.batches.close()
        self.console.close()
        try:
            self.writer.close()
        except UserError:
            if error is None:  # else the first error is the one to tell
                raise

    def run(self) -> int:
        """Take all steps that are left; the exit code."""
        total, begun = self.config.optimizer.steps, time.perf_counter()
        for line in introduction(self.config, self.mesh, self.data, self.folder, self.step):
            self.console.line(line)
        if self.step >= total:
            self.console.line(f"finished: all {total:,} steps were made already")
            return 0
        step_function = self._compile()
        self.clock.lap(1)
        while self.step < total and not self.stop.requested:
            self.state, metrics = step_function(self.state, next(self.batches))
            self.pending.append(metrics)
            self.step += 1
            jax.block_until_ready(self.pending[-2:][0])  # at most one step is queued
            self._follow_up(is_last=self.step == total)
        if self.stop.requested:
            return self._leave()
        self.writer.wait()
        if jax.process_index() == 0:
            draw(self.folder)
        self.console.line(
            f"finished {total:,} steps in {spelled_duration(time.perf_counter() - begun)};"
            f" sample with: python sample.py --ckpt {self.folder}"
        )
        return 0

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

    def _restore_or_begin(self) -> tuple[TrainState, int]:
        """The newest whole checkpoint's state on this mesh, or the state before the first step."""
        places = state_shardings(self.config, self.mesh)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(lambda: init_state(self.config)),
            places,
        )
        items = {"model": wanted.model, "optimizer": wanted.optimizer}
        restored = restore_newest(self.folder, items, report=warn, set_aside=True)
        if restored is None:
            return jit_init(self.config, self.mesh)(), 0
        if restored.meta.get("data") != self.data.fingerprint and not self.config.data.allow_change:
            raise UserError(
                f"the data in {self.data.path} are not those that step {restored.step} of"
                f" {self.folder} was trained on; restore them, or accept the change with"
                " --config.data.allow_change=true"
            )
        self.best_loss = restored.meta.get("best_validation_loss", math.inf)
        step, healthy = jax.device_put(
            (jnp.int32(restored.step), jnp.bool(True)), (places.step, places.healthy)
        )
        model, optimizer = restored.trees["model"], restored.trees["optimizer"]
        self.saved_step = restored.step
        return TrainState(step, healthy, model, optimizer), restored.step

    def _compile(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """The train step, compiled for the shapes of this run."""
        begun = time.perf_counter()
        tokens = (self.config.data.batch_size, self.config.data.sequence_length)
        batch = Batch(
            inputs_BT=jax.ShapeDtypeStruct(tokens, jnp.int32),
            targets_BT=jax.ShapeDtypeStruct(tokens, jnp.int32),
            weights_BT=jax.ShapeDtypeStruct(tokens, jnp.float32),
        )
        compiled = jit_train_step(self.config, self.mesh).lower(self.state, batch).compile()
        self.console.line(f"compiled  in {time.perf_counter() - begun:.1f} s")
        return compiled

    def _training_batches(self) -> Generator[Batch, None, None]:
        """Batches from the next step on, on their devices."""
        batches = training_batches(
            self.data,
            batch_size=self.config.data.batch_size,
            sequence_length=self.config.data.sequence_length,
            seed=self.config.data.seed,
            start_step=self.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return (place_batch(batch, self.mesh) for batch in batches)

    def _validation_batches(self) -> Iterator[Batch]:
        """The same batches at each validation, on their devices."""
        batches = validation_batches(
            self.data,
            batch_size=self.config.microbatch_size,
            sequence_length=self.config.data.sequence_length,
            limit=self.config.run.eval_batches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return (place_batch(batch, self.mesh) for batch in batches)

    def _report(self) -> None:
        """Write what the pending steps told, and stop the run if one of them was not finite."""
        told, self.pending = jax.device_get(self.pending), []
        seconds = self.clock.lap(len(told)) if told else 0.0
        first = self.step - len(told) + 1
        for step, metrics in enumerate(told, first):
            if not metrics.healthy:
                self._stop_before(step, metrics)
            self.metrics.write(
                {
                    "step": step,
                    "loss": float(metrics.loss),
                    "learning_rate": float(metrics.learning_rate),
                    "gradient_norm": float(metrics.gradient_norm),
                    "seconds": seconds,
                }
            )
        if told:
            loss = sum(float(metrics.loss) for metrics in told) / len(told)
            self.console.progress(self.step, self._line(loss, told[-1], seconds))

    def _line(self, loss: float, metrics: StepMetrics, seconds: float) -> str:
        """A step's line."""
        total, rate = self.config.optimizer.steps, self.config.tokens_per_step / seconds
        devices = self.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind) * devices.size
        flops = flops_per_token(self.config.model, self.config.data.sequence_length) * rate
        share = f"  mfu {flops / peak:.1%}" if peak else ""
        left = spelled_duration(seconds * (total - self.step))
        return (
            f"step {self.step:>{len(str(total))}}/{total}  loss {loss:.4f}"
            f"  lr {metrics.learning_rate:.2e}  norm {metrics.gradient_norm:.2f}"
            f"  {rate:,.0f} tok/s  {1000 * seconds:.0f} ms/step{share}  left {left}"
        )

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
        sums = []
        for batch in self._validation_batches():
            sums.append(self.evaluation_step(self.state.model, batch))
            jax.block_until_ready(sums[-2:][0])
            if self.stop.requested:
                return math.inf
        nll, tokens = (sum(float(value) for value in values) for values in zip(*sums))
        loss = nll / tokens
        perplexity = math.exp(min(loss, 700))
        record = {"step": self.step, "validation_loss": loss, "perplexity": perplexity}
        self.metrics.write(record)
        best = "  best so far" if loss < self.best_loss else ""
        self.console.line(
            f"step {self.step}  validation loss {loss:.4f}  perplexity {perplexity:.2f}{best}"
        )
        if self.config.run.sample_tokens and jax.process_count() == 1:
            self._sample()
        return loss

    def _sample(self) -> None:
        """Show what the model writes now."""
        pieces = stream(
            Engine(_unstack(self.state.model)),
            self.tokenizer,
            [self.tokenizer.encode(self.config.run.sample_prompt, bos=True, eos=False)],
            make_sampler(temperature=0.8, top_p=0.9),
            max_tokens=self.config.run.sample_tokens,
            seeds=[self.step],
            stop_ids=stop_ids(self.tokenizer, self.data.bos),
        )
        text = self.config.run.sample_prompt + "".join(piece.text for piece in pieces)
        self.console.line(textwrap.indent(textwrap.fill(text, 96), "  | "))

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


_unstack = jax.jit(unstack)
