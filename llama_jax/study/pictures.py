"""The pictures of a study: learning curves, losses by position, retrieval by distance.

Lines are means over seeds; bands and bars show their standard deviation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.study.evaluation import FULL, SLIDING
from llama_jax.study.settings import MULTIPLES, TEXT, VARIANTS, Scale
from llama_jax.training.plot import FAINT, INK, new_figure, smoothed

Row = dict[str, Any]
# Okabe and Ito's colours, which stay apart for all kinds of colour vision.
COLOURS = dict(
    zip(VARIANTS, ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#444444"), strict=True)
)
DPI = 100
ABOVE = 1.2  # nats above the lowest loss that pictures show; models may be much worse


def draw_learning(path: Path, rows: Sequence[Row]) -> Path:
    """Draw training and validation losses on text over steps; return the path of the PNG.

    Args:
      rows: of the steps of chosen runs, as `report.step_rows` returns them.
    """
    figure = new_figure(10, 4.2)
    train_axes, validation_axes = figure.subplots(1, 2, sharey=True)
    rows = [row for row in rows if row["task"] == TEXT]
    lowest = highest = 0.0
    for variant in _variants(rows):
        ours = [row for row in rows if row["variant"] == variant]
        _draw_band(
            train_axes, variant, *_mean_by("step", "loss", ours, partial(smoothed, windows=20))
        )
        validated = [row for row in ours if row["validation_loss"] != ""]
        x, mean, deviation = _mean_by("step", "validation_loss", validated)
        _draw_band(validation_axes, variant, x, mean, deviation, marker="o")
        lowest = min(lowest or mean.min(), mean.min(), min(row["loss"] for row in ours))
        highest = max(highest, mean.max())
    for axes, title in ((train_axes, "training, smoothed"), (validation_axes, "validation")):
        _finish(axes, title, "step")
        axes.set_ylim(lowest - 0.05, highest + 0.25)
    train_axes.set_ylabel("loss, nats per token", color=INK)
    validation_axes.legend(frameon=False)
    return _saved(figure, path)


def draw_positions(path: Path, scale: Scale, rows: Sequence[Row]) -> Path:
    """Draw the loss by position for each length, read in full and in sliding windows.

    Args:
      rows: of evaluations, as `study.evaluation.evaluate_text` returns them, with their trial.
    """
    figure = new_figure(12, 6.2)
    grid = figure.subplots(2, len(MULTIPLES), sharey=True)
    lowest = min(row["loss"] for row in rows)
    for index, reading in enumerate((FULL, SLIDING)):
        for axes, multiple in zip(grid[index], MULTIPLES):
            if multiple == 1 and reading == SLIDING:  # the same as in full
                _draw_scalings(axes, rows)
                multiple = MULTIPLES[-1]
            else:
                for variant in _variants(rows):
                    wanted = {"variant": variant, "reading": reading, "multiple": multiple}
                    _draw_losses(axes, variant, rows, wanted | {"scaling": "none"}, variant)
                _finish(axes, f"{multiple} × T, {reading}", "position" if index else "")
            axes.axvline(scale.length, color=FAINT, linewidth=1, linestyle="--")
            axes.set_xlim(0, multiple * scale.length)
            axes.set_ylim(lowest - 0.1, lowest + ABOVE)
        grid[index][0].set_ylabel("loss, nats per token", color=INK)
    lines, labels = grid[0][0].get_legend_handles_labels()  # every variant reads T in full
    figure.legend(lines, labels, loc="outside upper center", ncols=6, frameon=False)
    return _saved(figure, path)


def _draw_scalings(axes: Any, rows: Sequence[Row]) -> None:
    """Draw what scaling does for rotary embeddings at the longest length."""
    for scaling, line in (("none", "-"), ("linear", ":"), ("dynamic", "--")):
        wanted = {"variant": "rope", "reading": FULL, "multiple": MULTIPLES[-1]}
        _draw_losses(axes, "rope", rows, wanted | {"scaling": scaling}, scaling, linestyle=line)
    _finish(axes, f"{MULTIPLES[-1]} × T, full, rope by scaling", "position")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="lower left", ncols=3)


def _draw_losses(
    axes: Any, variant: str, rows: Sequence[Row], wanted: Row, label: str = "", **style: Any
) -> None:
    """Draw the losses of the records that are as wanted, at the middle of their buckets."""
    ours = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if not ours:
        return
    x, mean, deviation = _mean_by("position", "loss", ours)
    middle = x + (x[1] - x[0]) / 2
    _draw_band(axes, variant, middle, mean, deviation, marker=".", label=label, **style)


def draw_retrieval(path: Path, scale: Scale, rows: Sequence[Row]) -> Path:
    """Draw the accuracy of retrieval by distance, of all lengths together.

    Args:
      rows: of evaluations, as `study.evaluation.evaluate_retrieval` returns them, with their trial.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for variant in _variants(rows):
        ours = [row for row in rows if row["variant"] == variant]
        x, mean, deviation = _mean_by("distance", "accuracy", ours)
        _draw_band(axes, variant, x + scale.length / 8, mean, deviation, marker="o")
    axes.axvline(scale.length, color=FAINT, linewidth=1, linestyle="--")
    axes.axhline(1 / 8, color=FAINT, linewidth=1)
    axes.annotate("chance", (1, 1 / 8), xycoords=("axes fraction", "data"), color=INK, ha="right")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.03)
    _finish(axes, "retrieval; dashed: the training length", "distance to the value, tokens")
    axes.set_ylabel("accuracy", color=INK)
    axes.legend(frameon=False)
    return _saved(figure, path)


# ---- parts ----


def _variants(rows: Sequence[Row]) -> list[str]:
    there = {row["variant"] for row in rows}
    return [variant for variant in VARIANTS if variant in there]


def _mean_by(
    x: str, y: str, rows: Sequence[Row], smooth: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values of column `x` and, over seeds, mean and deviation of column `y` at each.

    Values of one seed are averaged first; only those of x that every seed has count.
    """
    curves = []
    for seed in sorted({row["seed"] for row in rows}):
        values: dict[float, list[float]] = {}
        for row in rows:
            if row["seed"] == seed:
                values.setdefault(row[x], []).append(row[y])
        curves.append({place: float(np.mean(each)) for place, each in values.items()})
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    table = np.array([smooth(np.array([curve[place] for place in common])) for curve in curves])
    deviation = table.std(axis=0, ddof=1) if len(table) > 1 else np.zeros(len(common))
    return np.array(common), table.mean(axis=0), deviation


def _draw_band(
    axes: Any, variant: str, x: np.ndarray, mean: np.ndarray, deviation: np.ndarray, **style: Any
) -> None:
    colour = COLOURS[variant]
    style = {"linewidth": 1.6, "markersize": 4, "label": variant} | style
    axes.plot(x, mean, color=colour, **style)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)


def _finish(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel(x_label, color=INK)
    axes.grid(axis="y", color=FAINT, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
