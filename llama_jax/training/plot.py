"""The picture of a run, RUN/loss.png, from its metrics: python -m llama_jax.plot RUN

Loss over steps, every step faintly and smoothed in front, validation as points, and under it the
learning rate. Drawn at the end of every run, and on demand while it goes on.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.run_folder import METRICS
from llama_jax.errors import UserError
from llama_jax.training.metrics import read_metrics

PICTURE = "loss.png"
INK, FAINT, TRAIN, VALIDATION = "#333333", "#bbbbbb", "#4c78a8", "#e4572e"


def draw(folder: Path) -> Path:
    """Draw the picture of a run; the path of the PNG.

    Raises:
      UserError: when the folder has no metrics yet.
    """
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} has no {METRICS}; expected the folder of a run")
    steps = read_metrics(folder)
    train = _series(steps, "loss")
    if not len(train[0]):
        raise UserError(f"{folder / METRICS} has no steps yet; train for longer")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, rate_axes) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=(5, 1), layout="constrained"
    )
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
    pyplot.close(figure)
    return path


def _series(steps: dict[int, dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that have a number of that name, and the numbers."""
    pairs = [(step, float(record[name])) for step, record in steps.items() if name in record]
    finite = [pair for pair in pairs if np.isfinite(pair[1])]
    return np.asarray([step for step, _ in finite]), np.asarray([value for _, value in finite])


def _draw_loss(
    axes: Any, train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]
) -> None:
    """The upper panel: what a person wants to see."""
    steps, losses = train
    axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(losses), color=TRAIN, linewidth=2, label="training, smoothed")
    if len(validation[0]):
        best = int(np.argmin(validation[1]))
        label = f"validation, best {validation[1][best]:.3f} at step {validation[0][best]:,}"
        axes.plot(*validation, "o-", color=VALIDATION, markersize=5, linewidth=1, label=label)
    lowest = min([losses.min(), *validation[1]])
    # The first steps fall from the height of chance; they must not squeeze all that follows.
    highest = np.quantile(losses[min(len(losses) // 50, 100) :], 0.995)
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest) + 1e-6)
    axes.set_ylabel("loss, nats per token", color=INK)
    axes.grid(axis="y", color=FAINT, alpha=0.4)
    axes.legend(frameon=False)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a fiftieth of the run, narrower at the ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
