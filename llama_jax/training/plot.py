"""The plot of a run's losses, loss.png in its folder, from its metrics.

Loss over steps, every step faintly with a smoothed line in front, validation losses as points, and
under it the learning rate. Drawn at the end of a run, and on demand while it goes on.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.run_folder import METRICS
from llama_jax.errors import UserError
from llama_jax.training.metrics import Record, read_metrics

PICTURE = "loss.png"
INK, FAINT, TRAIN, VALIDATION = "#333333", "#bbbbbb", "#4c78a8", "#e4572e"


def draw(folder: Path) -> Path:
    """Draw the losses of a run; return the path of the PNG.

    Raises:
      UserError: if the folder has no metrics yet.
    """
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} has no {METRICS}; expected the folder of a run")
    steps = read_metrics(folder)
    train = _series(steps, "loss")
    if not len(train[0]):
        raise UserError(f"{folder / METRICS} has no steps yet; train for longer")

    if "matplotlib" not in sys.modules:  # importing it fails where a notebook's backend is named
        os.environ.pop("MPLBACKEND", None)
    from matplotlib.figure import Figure  # not pyplot: a figure by itself needs no backend

    figure = Figure(figsize=(9, 6), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _draw_loss(loss_axes, train, _series(steps, "validation_loss"))
    rate_axes.plot(*_series(steps, "learning_rate"), color=FAINT, linewidth=1.5)
    rate_axes.set_ylabel("learning rate", color=INK)
    rate_axes.set_xlabel("step", color=INK)
    for axes in (loss_axes, rate_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.suptitle(folder.resolve().name, x=0.01, ha="left", color=INK, fontweight="bold")
    path = folder / PICTURE
    figure.savefig(path, dpi=130)
    return path


def _series(steps: dict[int, Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that have a finite number of that name, and the numbers."""
    pairs = [(step, float(record[name])) for step, record in steps.items() if name in record]
    finite = [pair for pair in pairs if np.isfinite(pair[1])]
    return np.asarray([step for step, _ in finite]), np.asarray([value for _, value in finite])


def _draw_loss(
    axes: Any, train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]
) -> None:
    """Draw the upper panel."""
    steps, losses = train
    axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(losses), color=TRAIN, linewidth=2, label="training, smoothed")
    if len(validation[0]):
        best = int(np.argmin(validation[1]))
        label = f"validation, best {validation[1][best]:.3f} at step {validation[0][best]:,}"
        axes.plot(*validation, "o-", color=VALIDATION, markersize=5, linewidth=1, label=label)
    lowest = min([losses.min(), *validation[1]])
    # The first steps start at the loss of chance; they must not squeeze all that follows.
    highest = np.quantile(losses[min(len(losses) // 50, 100) :], 0.995)
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest) + 1e-6)
    axes.set_ylabel("loss, nats per token", color=INK)
    axes.grid(axis="y", color=FAINT, alpha=0.4)
    axes.legend(frameon=False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return a centred running mean over a fiftieth of the run, narrower at the ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
