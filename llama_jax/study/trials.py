"""Training of a trial by `training.run`, and what it amounts to.

All trials of a variant and task share one compiled program: their seeds change no program without
dropout, and the learning rate is an argument of it.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.checkpoints.load import load
from llama_jax.checkpoints.run_folder import write_atomically
from llama_jax.config import Config
from llama_jax.data.loader import Batch
from llama_jax.distributed.mesh import batch_sharding
from llama_jax.errors import NonFiniteLossError, UserError, warn
from llama_jax.model.execution import Execution
from llama_jax.model.transformer import Llama
from llama_jax.study.data import is_query
from llama_jax.study.settings import TEXT, Scale, Trial, first_trials, run_folder
from llama_jax.training.metrics import Record, read_metrics
from llama_jax.training.objectives import next_token_loss
from llama_jax.training.run import train
from llama_jax.training.session import Session, open_session
from llama_jax.training.step import (
    StepMetrics,
    TrainState,
    jit_programs,
    make_execution,
    state_shardings,
    train_step,
)

LOSS = partial(next_token_loss, with_accuracy=True)
LOG = ".log"  # what the run printed, beside its folder
RESULT = "result.json"
EVALUATION = "evaluation.json"  # records of `study.evaluation`, of the best model


@dataclasses.dataclass(frozen=True)
class Result:
    """The best validation of a trial, by loss, and the last one."""

    step: int
    loss: float
    accuracy: float
    perplexity: float
    last_loss: float


DIVERGED = Result(step=0, loss=math.inf, accuracy=0.0, perplexity=math.inf, last_loss=math.inf)


# ---- one program for all trials of a variant and task ----


def scaled_step(
    state: TrainState, batch: Batch, scale: jax.Array, config: Config, execution: Execution
) -> tuple[TrainState, StepMetrics]:
    """Return what `train_step` does with `scale` times the learning rate of the config.

    AdamW's update, weight decay included, is proportional to the learning rate, and its moments do
    not depend on it.
    """
    after, metrics = train_step(state, batch, config, execution, LOSS)
    trainable = jax.tree.map(lambda a, b: a + scale * (b - a), state.trainable, after.trainable)
    rate = scale * metrics.learning_rate
    after = dataclasses.replace(after, trainable=trainable)
    return after, dataclasses.replace(metrics, learning_rate=rate)


class SharedPrograms:
    """The programs of trials whose configs differ in learning rate, seed and folder only."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        execution = make_execution(config, mesh)
        step = partial(scaled_step, config=config, execution=execution)
        places = state_shardings(config, mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        self._step = jax.jit(
            step,
            in_shardings=(places, batch_sharding(mesh), replicated),
            out_shardings=(places, replicated),
            donate_argnums=0,
        )
        self._rate = config.optimizer.learning_rate
        self._compiled: Any = None
        self.evaluate = jit_programs(config, mesh).evaluate

    def train(self, config: Config) -> "TrialStep":
        """Return the train step of a trial."""
        return TrialStep(self, jnp.float32(config.optimizer.learning_rate / self._rate))

    def compiled(self, state: TrainState, batch: Batch, scale: jax.Array) -> Any:
        """Return the compiled step, the same for every call."""
        if self._compiled is None:
            self._compiled = self._step.lower(state, batch, scale).compile()
        return self._compiled


@dataclasses.dataclass
class TrialStep:
    """A train step with what `training.run` uses of a jitted function."""

    programs: SharedPrograms
    scale: jax.Array

    def lower(self, state: TrainState, batch: Batch) -> "TrialStep":
        self._compiled = self.programs.compiled(state, batch, self.scale)
        return self

    def compile(self) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        return lambda state, batch: self._compiled(state, batch, self.scale)


@lru_cache(maxsize=32)
def _shared(config: Config, mesh: Mesh) -> SharedPrograms:
    return SharedPrograms(config, mesh)


def shared_programs(config: Config, base_rate: float, mesh: Mesh) -> SharedPrograms:
    """Return the programs of a trial, which other trials may have compiled.

    Args:
      base_rate: the learning rate that they are compiled with.
    """
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=base_rate, min_learning_rate=0.1 * base_rate
    )
    seed = config.run.seed if config.model.dropout else 0
    run = dataclasses.replace(config.run, checkpoint_dir="any", seed=seed)
    data = dataclasses.replace(config.data, seed=0)
    return _shared(dataclasses.replace(config, optimizer=optimizer, run=run, data=data), mesh)


# ---- a trial ----


def train_trial(task: str, config: Config, base_rate: float) -> int:
    """Train a trial on the first device, from where it stopped; return `run.fit`'s exit code.

    A trial that diverges is finished, with an infinite loss.
    """
    folder = Path(config.run.checkpoint_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        folder.with_name(folder.name + LOG).open("a") as file,
        contextlib.redirect_stdout(file),
        open_session(config, devices=jax.devices()[:1]) as session,
    ):
        shared = shared_programs(config, base_rate, session.mesh)
        programs = dataclasses.replace(
            session.programs, train=shared.train(config), evaluate=shared.evaluate
        )
        session = dataclasses.replace(session, programs=programs)
        code = _train(session if task == TEXT else answers_only(session))
    if code in (0, NonFiniteLossError.exit_code):
        result = best_validation(read_metrics(folder)) if code == 0 else DIVERGED
        content = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
        write_atomically(folder / RESULT, content.encode())
    return 0 if code == NonFiniteLossError.exit_code else code


def _train(session: Session) -> int:
    try:
        return train(session)
    except NonFiniteLossError as error:
        warn(str(error))
        return error.exit_code


def answers_only(session: Session) -> Session:
    """Return a session of the retrieval task, in whose loss only the answers count."""
    vocab_size = session.config.model.vocab_size

    def masked(batches: Any) -> Iterator[Batch]:
        with contextlib.closing(batches):
            for batch in batches:
                weights_BT = _answers(batch.inputs_BT, vocab_size)
                yield dataclasses.replace(batch, weights_BT=weights_BT)

    def validation() -> dict[str, Iterator[Batch]]:
        return {name: masked(each) for name, each in session.validation_batches().items()}

    return dataclasses.replace(
        session,
        batches=lambda step: masked(session.batches(step)),
        validation_batches=validation,
    )


@partial(jax.jit, static_argnames="vocab_size")
def _answers(inputs_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Return the loss weights [B, T] of the retrieval task."""
    return is_query(inputs_BT, vocab_size).astype(jnp.float32)


def best_validation(steps: dict[int, Record]) -> Result:
    """Return the validation with the lowest loss among the metrics of a run."""
    validated = {
        step: record
        for step, record in steps.items()
        if math.isfinite(float(record.get("validation_loss", math.nan)))
    }
    best = min(validated, key=lambda step: validated[step]["validation_loss"])
    record = validated[best]
    return Result(
        step=best,
        loss=record["validation_loss"],
        accuracy=record["accuracy"],
        perplexity=record["perplexity"],
        last_loss=validated[max(validated)]["validation_loss"],
    )


def read_result(folder: Path) -> Result | None:
    """Return the result of a trial's run; None if it is not finished."""
    path = folder / RESULT
    try:
        return Result(**json.loads(path.read_text())) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and train again") from error


def best_trial(scale: Scale, folder: Path, task: str, variant: str) -> Trial | None:
    """Return the first seed's trial with the lowest validation loss; None if there is none."""
    found = {}
    for trial in first_trials(scale, task, variant):
        result = read_result(run_folder(folder, trial))
        if result is not None and math.isfinite(result.loss):
            found[trial] = result.loss
    return min(found, key=found.__getitem__) if found else None


def load_best(folder: Path, result: Result) -> Llama:
    """Return the model of a trial's best validation."""
    return load(folder / str(result.step)).model
