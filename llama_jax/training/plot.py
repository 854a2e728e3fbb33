"""Pictures of losses: loss.png in a run's folder, and several runs in one for comparison.

Loss over steps, smoothed, with the validation losses as points, and under it the learning rate. The
picture of one run also shows every step, faintly. It is drawn again and again while a run goes on;
a viewer never sees half a file.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.run_folder import METRICS
from llama_jax.errors import UsageError, UserError
from llama_jax.training.metrics import Record, read_metrics

PICTURE = "loss.png"
SUFFIXES = (".png", ".svg", ".pdf")
INK, FAINT, TRAIN, VALIDATION = "#333333", "#bbbbbb", "#4c78a8", "#e4572e"
# Colours that people with any colour vision tell apart (Okabe & Ito 2008), by run.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")  # of the runs that share a colour
SHOWN_FROM = 0.03  # of the longest run: the losses from there on have room in a comparison

Series = tuple[np.ndarray, np.ndarray]  # steps, and finite numbers


def draw(folder: Path) -> Path:
    """Draw the losses of a run; return the path of the PNG.

    Raises:
      UserError: if the folder has no metrics yet.
    """
    steps = _read(folder)
    figure, (loss_axes, rate_axes) = _figure(folder.resolve().name)
    train, validation = _series(steps, "loss"), _series(steps, "validation_loss")
    loss_axes.plot(*train, color=TRAIN, alpha=0.25, linewidth=0.8)
    loss_axes.plot(
        train[0], smoothed(train[1]), color=TRAIN, linewidth=2, label="training, smoothed"
    )
    if len(validation[0]):
        label = f"validation, {_best(validation)}"
        _draw_points(loss_axes, validation, color=VALIDATION, label=label)
    rate_axes.plot(*_series(steps, "learning_rate"), color=FAINT, linewidth=1.5)
    # The first steps start at the loss of chance; they must not squeeze all that follows.
    later = train[1][min(len(train[1]) // 50, 100) :]
    _finish(loss_axes, min([train[1].min(), *validation[1]]), np.quantile(later, 0.995))
    return _save(figure, folder / PICTURE)


def compare(folders: Sequence[Path], path: Path) -> Path:
    """Draw the losses of several runs in one picture; return its path.

    Args:
      path: of the picture, whose suffix is its format.

    Raises:
      UsageError: for another suffix, or a run that is given twice.
      UserError: if a folder has no metrics yet, or the picture cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        expected = f"a name that ends with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UsageError(f"--output={path} is no picture; expected {expected}")
    names = _names(folders)
    runs = [_read(folder) for folder in folders]
    figure, (loss_axes, rate_axes) = _figure("")
    start = SHOWN_FROM * max(max(steps) for steps in runs)
    lowest, highest = [], []
    for index, (name, steps) in enumerate(zip(names, runs)):
        look = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
        }
        train, validation = _series(steps, "loss"), _series(steps, "validation_loss")
        losses = smoothed(train[1])
        has_points = len(validation[0]) > 0
        label = (
            f"{name}: {_best(validation)}" if has_points else f"{name}: {losses[-1]:.3f} at the end"
        )
        loss_axes.plot(
            train[0], losses, **look, linewidth=1.2, alpha=0.45 if has_points else 1,
            label=None if has_points else label,
        )  # fmt: skip
        if has_points:
            _draw_points(loss_axes, validation, label=label, **look)
        rate_axes.plot(*_series(steps, "learning_rate"), **look, linewidth=1.2)
        lowest.append(min([losses.min(), *validation[1]]))
        highest.append(max([losses[-1], *losses[train[0] >= start]]))
    _finish(loss_axes, min(lowest), max(highest))
    loss_axes.set_title("validation: points; training, smoothed: lines", loc="left", color=INK)
    try:
        return _save(figure, path)
    except OSError as error:
        message = f"cannot write to {path}: {error.strerror}; choose another place"
        raise UserError(message) from error


def _read(folder: Path) -> dict[int, Record]:
    """Return the records of a run that has taken a step."""
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} has no {METRICS}; expected the folder of a run")
    steps = read_metrics(folder)
    if not len(_series(steps, "loss")[0]):
        raise UserError(f"{folder / METRICS} has no steps yet; train for longer")
    return steps


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: that of its folder, or its path where names are equal."""
    paths = [folder.resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise UsageError(f"{folders[index]} is given twice; expected different runs")
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, sizes in inches, whatever backend is named."""
    backend = os.environ.get("MPLBACKEND")
    if "matplotlib" not in sys.modules:  # importing it fails where a notebook's backend is named
        os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure  # not pyplot: a figure by itself needs no backend

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
    return Figure(figsize=(width, height), layout="constrained")


def _figure(title: str) -> tuple[Any, Any]:
    """Return a figure, and its axes for losses and learning rates."""
    figure = new_figure(9, 6)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    loss_axes.set_ylabel("loss, nats per token", color=INK)
    loss_axes.grid(axis="y", color=FAINT, alpha=0.4)
    rate_axes.set_ylabel("learning rate", color=INK)
    rate_axes.set_xlabel("step", color=INK)
    for axes in (loss_axes, rate_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontweight="bold")
    return figure, (loss_axes, rate_axes)


def _series(steps: dict[int, Record], name: str) -> Series:
    """Return the steps that have a finite number of that name, and the numbers."""
    pairs = [(step, float(record[name])) for step, record in steps.items() if name in record]
    finite = [pair for pair in pairs if np.isfinite(pair[1])]
    return np.asarray([step for step, _ in finite]), np.asarray([value for _, value in finite])


def _best(validation: Series) -> str:
    """Format the lowest of some losses, with its step."""
    best = int(np.argmin(validation[1]))
    return f"best {validation[1][best]:.3f} at step {validation[0][best]:,}"


def _draw_points(axes: Any, series: Series, **look: Any) -> None:
    axes.plot(*series, marker="o", markersize=5, linewidth=1, **look)


def _finish(axes: Any, lowest: float, highest: float) -> None:
    """Set the range of the losses, and add the legend."""
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest) + 1e-6)
    axes.legend(frameon=False)


def _save(figure: Any, path: Path) -> Path:
    """Write a figure to a file beside `path`, which then replaces it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=130, format=path.suffix[1:].lower())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def smoothed(values: np.ndarray, windows: int = 50) -> np.ndarray:
    """Return a centred running mean, narrower at the ends.

    Args:
      windows: how many windows the values have room for.
    """
    half = max(1, len(values) // (2 * windows))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
