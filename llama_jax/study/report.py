"""The report of a study, from what its runs left: CSV files, tables and pictures.

`steps.csv` and `epochs.csv` have the curves of every run, `positions.csv` and `retrieval.csv` the
evaluations of chosen runs, `results.csv` and `results.md` their means and standard deviations over
seeds. It can be written at any time, of what is there.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.run_folder import write_atomically
from llama_jax.data.sources import open_sources
from llama_jax.study.evaluation import FULL, SLIDING
from llama_jax.study.pictures import draw_learning, draw_positions, draw_retrieval
from llama_jax.study.settings import (
    MULTIPLES,
    RETRIEVAL,
    TEXT,
    VARIANTS,
    Scale,
    Trial,
    first_trials,
    run_folder,
    tasks,
    trial_config,
)
from llama_jax.study.trials import EVALUATION, Result, best_trial, read_result
from llama_jax.training.metrics import read_metrics
from llama_jax.training.session import epoch_steps

Row = dict[str, Any]
TRIAL = ("task", "variant", "learning_rate", "seed")  # the first columns
VALIDATION = ("validation_loss", "validation_accuracy", "validation_perplexity")
READINGS = ((FULL, "none"), (FULL, "linear"), (FULL, "dynamic"), (SLIDING, "none"))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished trial."""

    trial: Trial
    folder: Path
    result: Result
    is_chosen: bool  # its learning rate is that of the variant

    @property
    def keys(self) -> Row:
        """What its rows begin with."""
        return dataclasses.asdict(self.trial)

    def records(self) -> list[Row]:
        """Return the records of its evaluation; none if it has not been evaluated."""
        path = self.folder / EVALUATION
        return json.loads(path.read_text()) if path.is_file() else []


def finished_runs(scale: Scale, folder: Path) -> list[Run]:
    """Return the finished runs of a study."""
    runs = []
    for task in tasks(scale):
        for variant in VARIANTS:
            trials = first_trials(scale, task, variant)
            best = best_trial(scale, folder, task, variant)
            if best:
                trials += [dataclasses.replace(best, seed=n) for n in range(1, scale.seeds)]
            for trial in trials:
                place = run_folder(folder, trial)
                if result := read_result(place):
                    is_chosen = best is not None and trial.learning_rate == best.learning_rate
                    runs.append(Run(trial, place, result, is_chosen))
    return runs


def write_report(scale: Scale, folder: Path) -> list[Path]:
    """Write all files of the report; return their paths."""
    runs = finished_runs(scale, folder)
    steps, epochs = [], []
    lengths: dict[str, int] = {}  # steps of an epoch, by task
    for run in runs:
        task = run.trial.task
        if task not in lengths:
            config = trial_config(scale, folder, run.trial, steps=1)
            lengths[task] = epoch_steps(config, open_sources(config.data))
        rows = step_rows(run)
        steps += rows
        epochs += epoch_rows(rows, lengths[task])
    chosen = [run for run in runs if run.is_chosen]
    records = {
        task: [run.keys | row for run in chosen if run.trial.task == task for row in run.records()]
        for task in (TEXT, RETRIEVAL)
    }
    results = [
        row
        for task in tasks(scale)
        for variant in VARIANTS
        if (row := summary(task, variant, chosen, records[task]))
    ]
    paths = [
        _write_csv(folder / f"{name}.csv", rows)
        for name, rows in (
            ("steps", steps),
            ("epochs", epochs),
            ("results", results),
            ("positions", records[TEXT]),
            ("retrieval", records[RETRIEVAL]),
        )
        if rows
    ]
    path = folder / "results.md"
    write_atomically(path, markdown(scale, results).encode())
    names = {run.trial for run in chosen}
    curves = [row for row in steps if Trial(*(row[key] for key in TRIAL)) in names]
    paths += [path, draw_learning(folder / "learning.png", curves)]
    if records[TEXT]:
        paths.append(draw_positions(folder / "positions.png", scale, records[TEXT]))
    if records[RETRIEVAL]:
        paths.append(draw_retrieval(folder / "retrieval.png", scale, records[RETRIEVAL]))
    return paths


# ---- curves ----


def step_rows(run: Run) -> list[Row]:
    """Return the metrics of every step of a run; of validation at some."""
    return [
        run.keys
        | {
            "step": step,
            "rate": record["learning_rate"],
            "loss": record["loss"],
            "accuracy": record["train_accuracy"],
            "perplexity": _perplexity(record["loss"]),
            "validation_loss": record.get("validation_loss", ""),
            "validation_accuracy": record.get("accuracy", ""),
            "validation_perplexity": record.get("perplexity", ""),
        }
        for step, record in read_metrics(run.folder).items()
        if "loss" in record
    ]


def epoch_rows(rows: Sequence[Row], epoch: int) -> list[Row]:
    """Return means over each pass over the data, with the last validation in it.

    Args:
      rows: of the steps of a run.
      epoch: steps of a pass; the last one may be incomplete.
    """
    found = []
    for number, start in enumerate(range(0, len(rows), epoch), 1):
        steps = rows[start : start + epoch]
        validated = [row for row in steps if row["validation_loss"] != ""]
        last = validated[-1] if validated else dict.fromkeys(VALIDATION, "")
        loss = float(np.mean([row["loss"] for row in steps]))
        found.append(
            {key: steps[0][key] for key in TRIAL}
            | {
                "epoch": number,
                "steps": len(steps),
                "loss": loss,
                "accuracy": float(np.mean([row["accuracy"] for row in steps])),
                "perplexity": _perplexity(loss),
            }
            | {key: last[key] for key in VALIDATION}
        )
    return found


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


# ---- results ----


def summary(task: str, variant: str, chosen: Sequence[Run], records: Sequence[Row]) -> Row:
    """Return a variant's means and standard deviations over seeds; empty if it has no run.

    Args:
      chosen: runs of all tasks and variants.
      records: of the evaluations of this task.
    """
    runs = [run for run in chosen if (run.trial.task, run.trial.variant) == (task, variant)]
    if not runs:
        return {}
    row: Row = {"task": task, "variant": variant, "learning_rate": runs[0].trial.learning_rate}
    row["seeds"] = len(runs)
    for name in ("loss", "accuracy", "perplexity", "last_loss", "step"):
        row |= _spread(f"best_{name}", [getattr(run.result, name) for run in runs])
    ours = [record for record in records if record["variant"] == variant]
    metric = "loss" if task == TEXT else "accuracy"
    for reading, scaling in READINGS if task == TEXT else [("", "")]:
        for multiple in MULTIPLES:
            found = [
                record
                for record in ours
                if record["multiple"] == multiple
                and (record.get("reading", ""), record.get("scaling", "")) == (reading, scaling)
            ]
            name = "_".join(filter(None, [metric, reading, scaling, f"{multiple}x"]))
            row |= _spread(name, _by_seed(found, metric))
    return row


def _by_seed(records: Sequence[Row], metric: str) -> list[float]:
    """Return the mean of a metric over the tokens of each seed's records."""
    means = []
    for seed in sorted({record["seed"] for record in records}):
        ours = [record for record in records if record["seed"] == seed]
        weights = [record["tokens"] for record in ours]
        means.append(float(np.average([record[metric] for record in ours], weights=weights)))
    return means


def _spread(name: str, values: Sequence[float]) -> Row:
    """Return mean and sample standard deviation; the latter is empty for a single value."""
    if not values:
        return {f"{name}_mean": "", f"{name}_std": ""}
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else ""
    return {f"{name}_mean": float(np.mean(values)), f"{name}_std": deviation}


def markdown(scale: Scale, results: Sequence[Row]) -> str:
    """Return the tables of a study."""
    of_text = [row for row in results if row["task"] == TEXT]
    of_retrieval = [row for row in results if row["task"] == RETRIEVAL]
    parts = [
        f"Mean ± standard deviation over seeds; T = {scale.length} tokens, losses in nats per"
        " token.\n",
        "Validation at the best step:\n",
        _table(
            ["position", "learning rate", "seeds", "loss", "perplexity", "accuracy", "last loss"],
            [
                [
                    row["variant"],
                    f"{row['learning_rate']:g}",
                    row["seeds"],
                    _shown(row, "best_loss"),
                    _shown(row, "best_perplexity", 2),
                    _shown(row, "best_accuracy"),
                    _shown(row, "best_last_loss"),
                ]
                for row in of_text
            ],
        ),
        "Loss in sequences of 1 to 8 T; every token sees all before it, or in sliding windows of T"
        " the last T/2 to T:\n",
        _table(
            ["position", *(f"{multiple} T" for multiple in MULTIPLES)],
            [
                [
                    label,
                    _shown(row, f"loss_{FULL}_none_1x"),  # the same however it is read
                    *(_shown(row, f"{name}_{multiple}x") for multiple in MULTIPLES[1:]),
                ]
                for row in of_text
                for label, name in _readings_of(row)
            ],
        ),
    ]
    if of_retrieval:
        lengths = [f"{multiple} T" for multiple in MULTIPLES]
        parts += [
            "Retrieval, accuracy in sequences of 1 to 8 T (chance: 0.125):\n",
            _table(
                ["position", "learning rate", "seeds", *lengths],
                [
                    [
                        row["variant"],
                        f"{row['learning_rate']:g}",
                        row["seeds"],
                        *(_shown(row, f"accuracy_{multiple}x", 3) for multiple in MULTIPLES),
                    ]
                    for row in of_retrieval
                ],
            ),
        ]
    return "\n".join(parts)


def _readings_of(row: Row) -> list[tuple[str, str]]:
    """Return the label and the column name of each way in which a variant was read."""
    found = []
    for reading, scaling in READINGS:
        name = f"loss_{reading}_{scaling}"
        if any(row[f"{name}_{multiple}x_mean"] != "" for multiple in MULTIPLES[1:]):
            scaled = "" if scaling == "none" else f", {scaling} scaling"
            sliding = ", sliding" if reading == SLIDING else ""
            found.append((f"{row['variant']}{scaled}{sliding}", name))
    return found


def _shown(row: Row, name: str, digits: int = 4) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_std"]
    if mean == "":
        return "–"
    spread = "" if deviation == "" else f" ± {deviation:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows; those without a column leave it empty."""
    text, columns = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
    return path
