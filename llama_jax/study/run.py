"""A study from its settings to its report, resumable at any point.

A finished trial leaves `result.json` in its run's folder, an evaluated one `evaluation.json`; what
is there is not done again. A run that was interrupted goes on from its newest checkpoint. Several
processes may run different variants of a study at the same time.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax.checkpoints.run_folder import write_atomically
from llama_jax.data.sources import open_sources
from llama_jax.data.token_folder import TokenFolder
from llama_jax.errors import UserError, did_you_mean
from llama_jax.model.parameters import count_parameters, flops_per_token
from llama_jax.study import report
from llama_jax.study.data import prepare_data, require_corpus
from llama_jax.study.evaluation import Records, evaluate_retrieval, evaluate_text
from llama_jax.study.settings import (
    RETRIEVAL,
    TEXT,
    VARIANTS,
    Scale,
    Trial,
    data_folder,
    first_trials,
    model_config,
    run_folder,
    tasks,
    trial_config,
)
from llama_jax.study.trials import (
    EVALUATION,
    Result,
    best_trial,
    load_best,
    read_result,
    train_trial,
)
from llama_jax.training.metrics import format_duration
from llama_jax.training.session import epoch_steps

STUDY = "study.json"  # the settings of the study in a folder
VERSION = 1  # of these files
SECONDS_PER_TRIAL = 4.0  # to open, validate and save; of a small model on two cores
EFFICIENCY = 0.3  # FLOP/s of a small model's step by those of one matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study in its folder, and the part of it that is run."""

    scale: Scale
    corpus: str
    folder: Path
    variants: tuple[str, ...] = VARIANTS
    seeds: tuple[int, ...]


def check_study(study: Study) -> None:
    """Raise an error for a variant, seed, corpus or folder that is none of this study's.

    Raises:
      UserError: in one line, before anything is written.
    """
    for variant in study.variants:
        if variant not in VARIANTS:
            expected = f"; expected one of {', '.join(VARIANTS)}"
            hint = did_you_mean(variant, VARIANTS)
            raise UserError(f"variant {variant!r} is unknown{hint or expected}")
    for seed in study.seeds:
        if not 0 <= seed < study.scale.seeds:
            raise UserError(
                f"seed={seed} is out of range; expected 0 to {study.scale.seeds - 1} at the scale"
                f" {study.scale.name!r}"
            )
    require_corpus(study.corpus)
    path, folder = study.folder / STUDY, study.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{folder} is a file; expected a folder for the study: choose another --out"
        )
    if not path.is_file():
        others = [each.name for each in folder.iterdir()] if folder.exists() else []
        if others:
            raise UserError(
                f"{folder} is not empty and holds no study (it has {min(others)!r}); choose another"
                " --out"
            )
        return
    try:
        there = json.loads(path.read_text())
        differing = [key for key, value in _settings(study).items() if there[key] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; choose another --out") from error
    if differing:
        key = differing[0]
        raise UserError(
            f"{folder} holds another study: {key} is {there[key]!r} there and"
            f" {_settings(study)[key]!r} here; choose another --out, or the same settings"
        )


def _settings(study: Study) -> dict[str, object]:
    scale = json.loads(json.dumps(dataclasses.asdict(study.scale)))
    return {"version": VERSION, "corpus": study.corpus, **scale}


def run_study(study: Study) -> int:
    """Train and evaluate what is missing, and write the report; return the exit code.

    It is 0 at the end, and 130, 143 or 129 after a signal, when the same command goes on.

    Raises:
      UserError: as `check_study`, or where a trial cannot be run.
    """
    check_study(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    if not (study.folder / STUDY).exists():
        content = json.dumps(_settings(study), indent=2) + "\n"
        write_atomically(study.folder / STUDY, content.encode())
    prepare_data(study.scale, study.folder, study.corpus)
    runner = Runner(study)
    runner.introduce()
    code = runner.run()
    if code == 0 or any(runner.results()):
        for path in report.write_report(study.scale, study.folder):
            print(f"written   {path}")
    if code:
        print("stopped; the same command goes on from there")
    return code


class Runner:
    """Runs the trials of a study, one after another."""

    def __init__(self, study: Study) -> None:
        self.study, self.scale, self.folder = study, study.scale, study.folder
        self._steps = {task: self._steps_of(task) for task in tasks(self.scale)}
        self._seconds: dict[str, list[float]] = {task: [] for task in self._steps}

    def _steps_of(self, task: str) -> int:
        """Return the steps of a run."""
        scale = self.scale
        if task == RETRIEVAL or scale.steps:
            return scale.retrieval_steps if task == RETRIEVAL else scale.steps
        trial = Trial(task, VARIANTS[0], scale.learning_rates[0], 0)
        config = trial_config(scale, self.folder, trial, scale.epochs)
        return scale.epochs * epoch_steps(config, open_sources(config.data))

    def results(self) -> Iterator[Result]:
        """Yield the results that there are."""
        for path in sorted((self.folder / "runs").glob("*")):
            if path.is_dir() and (result := read_result(path)):
                yield result

    # ---- which trials, and how long they take ----

    def _left(self) -> dict[str, int]:
        """Return the number of trials that are still to be trained, by task."""
        left = {}
        for task in self._steps:
            left[task] = 0
            for variant in self.study.variants:
                first = first_trials(self.scale, task, variant)
                missing = [each for each in first if read_result(self._run(each)) is None]
                rate = self._best_rate(task, variant) if not missing else 0.0
                others = [seed for seed in self.study.seeds if seed]
                done = [
                    seed
                    for seed in others
                    if rate and read_result(self._run(Trial(task, variant, rate, seed)))
                ]
                left[task] += len(missing) + len(others) - len(done)
        return left

    def _estimate(self) -> float:
        """Return the seconds that are left, by trials made so far or the speed of a matmul."""
        total = 0.0
        for task, count in self._left().items():
            made = self._seconds[task]
            total += count * (sum(made) / len(made) if made else self._predicted(task))
        return total

    def _predicted(self, task: str) -> float:
        """Return the seconds that a trial should take on this machine."""
        scale = self.scale
        flops = flops_per_token(model_config(scale, "rope"), scale.length)
        tokens = self._steps[task] * scale.batch_size * scale.length
        return SECONDS_PER_TRIAL + tokens * flops / (EFFICIENCY * _matmul_speed(scale))

    def introduce(self) -> None:
        """Print what is going to be done, and how long it will take."""
        scale = self.scale
        parameters = count_parameters(model_config(scale, "rope"))
        text = TokenFolder.open(data_folder(self.folder, TEXT))
        tokens = text.splits["train"].tokens
        variants, seeds = len(self.study.variants), len(self.study.seeds)
        print(
            f"study     {variants} variant{'s' * (variants != 1)},"
            f" {seeds} seed{'s' * (seeds != 1)}, scale {scale.name!r}: {parameters:,} parameters,"
            f" sequences of {scale.length} tokens"
        )
        print(f"data      {self.study.corpus}: {tokens:,} tokens, contiguous split")
        for task, steps in self._steps.items():
            passes = steps * scale.batch_size * scale.length / tokens
            of_text = f", {passes:.1f} passes over the text" if task == TEXT else ""
            print(f"task      {task}: runs of {steps:,} steps{of_text}")
        left = sum(self._left().values())
        print(f"to do     {left} runs, about {format_duration(self._estimate())}", flush=True)

    # ---- running them ----

    def run(self) -> int:
        """Train and evaluate what is missing; return the exit code.

        Seed by seed, so that a study that was stopped has all variants.
        """
        for task in self._steps:
            for seed in (0, *(seed for seed in self.study.seeds if seed)):
                for variant in self.study.variants:
                    if code := self._run_seed(task, variant, seed):
                        return code
        return 0

    def _run_seed(self, task: str, variant: str, seed: int) -> int:
        """Train the runs of a seed, and evaluate the one of the chosen learning rate."""
        if seed == 0:
            trials = first_trials(self.scale, task, variant)
        else:
            trials = [Trial(task, variant, self._best_rate(task, variant), seed)]
        for trial in trials:
            if read_result(self._run(trial)) is None and (code := self._train(trial)):
                return code
        chosen = Trial(task, variant, self._best_rate(task, variant), seed)
        if not (self._run(chosen) / EVALUATION).is_file():
            self._evaluate(chosen)
        return 0

    def _run(self, trial: Trial) -> Path:
        return run_folder(self.folder, trial)

    def _best_rate(self, task: str, variant: str) -> float:
        """Return the learning rate that the first seed chooses."""
        best = best_trial(self.scale, self.folder, task, variant)
        if best is None:
            raise UserError(
                f"variant {variant!r} diverged with every learning rate"
                f" ({', '.join(f'{rate:g}' for rate in self.scale.learning_rates)})"
            )
        return best.learning_rate

    def _train(self, trial: Trial) -> int:
        started = time.perf_counter()
        config = trial_config(self.scale, self.folder, trial, self._steps[trial.task])
        rates = self.scale.learning_rates
        if code := train_trial(trial.task, config, rates[len(rates) // 2]):
            return code
        seconds = time.perf_counter() - started
        self._seconds[trial.task].append(seconds)
        result = read_result(self._run(trial))
        assert result is not None
        print(
            f"trained   {trial.task:9} {trial.variant:10} rate {trial.learning_rate:<6g} seed"
            f" {trial.seed}  validation loss {result.loss:.4f} at step {result.step:,}"
            f"  {format_duration(seconds)}, {format_duration(self._estimate())} left",
            flush=True,
        )
        return 0

    def _evaluate(self, trial: Trial) -> None:
        folder = self._run(trial)
        result = read_result(folder)
        assert result is not None
        model = load_best(folder, result)
        records: Records
        if trial.task == TEXT:
            data = TokenFolder.open(data_folder(self.folder, TEXT))
            records = evaluate_text(model, trial.variant, data, self.scale)
        else:
            records = evaluate_retrieval(model, trial.variant, self.scale)
        content = json.dumps(records, indent=1) + "\n"
        write_atomically(folder / EVALUATION, content.encode())


def _matmul_speed(scale: Scale) -> float:
    """Return this device's FLOP/s in a matmul as large as those of a step."""
    rows, D = scale.batch_size * scale.length, scale.dim
    x_RD, w_DF = jnp.ones((rows, D)), jnp.ones((D, 4 * D))
    function = jax.jit(lambda x_RD, w_DF: x_RD @ w_DF)
    function(x_RD, w_DF).block_until_ready()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.3:
        function(x_RD, w_DF).block_until_ready()
        count += 1
    return count * 2 * rows * D * 4 * D / (time.perf_counter() - started)
