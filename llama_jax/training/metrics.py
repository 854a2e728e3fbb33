"""What a run tells while it goes: a line or a bar on the console, metrics.jsonl, TensorBoard.

Only process 0 speaks. Does not know where the numbers come from.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax

from llama_jax.checkpoints.run_folder import METRICS
from llama_jax.config import Config
from llama_jax.errors import UsageError, warn
from llama_jax.hardware.accelerators import MemoryUse, memory_use, peak_flops
from llama_jax.model.parameters import flops_per_token
from llama_jax.training.step import StepMetrics


def spelled_duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m04s or 5s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class Console:
    """Plain lines, and on a terminal a progress bar under them."""

    def __init__(self, total: int, start: int) -> None:
        from tqdm.auto import tqdm

        self._speaks = jax.process_index() == 0
        self._bar = tqdm(
            total=total,
            initial=start,
            # The line has speed and time left already; tqdm's own would leave the bar no room.
            bar_format="{bar:10} {n_fmt}/{total_fmt}  {desc}",
            dynamic_ncols=True,
            disable=not (self._speaks and sys.stderr.isatty()),
        )

    def line(self, text: str) -> None:
        """One line, or several."""
        if self._speaks:
            self._bar.clear()
            print(text, flush=True)
            self._bar.refresh()

    def progress(self, step: int, line: str) -> None:
        """Where the run stands: on the bar if there is one, else as a line."""
        if self._bar.disable:
            self.line(line)
            return
        self._bar.set_description_str(line.partition("  ")[2], refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class MetricsFile:
    """Appends records to metrics.jsonl, and to TensorBoard events when asked.

    A disk that refuses a record costs one warning line, not the run.
    """

    def __init__(self, folder: Path, tensorboard: bool):
        self._file = _continued(folder / METRICS) if jax.process_index() == 0 else None
        self._events = None
        self._has_warned = False
        if tensorboard and self._file:
            pass

            self._events = event_writer(folder / "tensorboard")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it has a `step`."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(_finite(record)) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._has_warned:
                warn(f"{METRICS} is not written: {error.strerror}; training goes on")
            self._has_warned = True
        if self._events is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, record["step"])

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        for output in (self._file, self._events):
            if output is not None:
                with contextlib.suppress(OSError):  # a full disk was warned of already
                    output.close()


def _continued(path: Path) -> TextIO:
    """A file to append lines to, after ending the one that a killed process left unfinished."""
    is_cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    file = path.open("a")
    file.write("\n" if is_cut else "")
    return file


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with numbers that JSON lacks (NaN, Inf) as text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def read_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """All records by step, merged; of a step that was run twice, the later numbers."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (folder / METRICS).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off when the process was killed
            continue
        steps.setdefault(record["step"], {}).update(record)
    return dict(sorted(steps.items()))


# TensorBoard events through tensorboardX, which is an extra.


def event_writer(folder: Path) -> Any:
    """A writer with `add_scalar(name, value, step)` and `close()`.

    Raises:
      UsageError: when tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "run.tensorboard needs tensorboardX; install it with: pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))


# Where a run's wall time goes: seconds a step, and the share of all time spent in steps.
#
# The rest is restoring, compiling, validating, sampling and saving. Over several sittings, a step
# that was made twice counts once, and the time between sittings does not count at all.

SITTING, WALL = "sitting", "wall_seconds"  # fields of a record that a later sitting reads


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What the sittings before this one took, as far as metrics.jsonl tells."""

    sittings: int = 0
    wall: float = 0.0  # seconds, of each sitting up to its last record
    steps: float = 0.0  # seconds, of the steps that this sitting goes on from


class StepClock:
    """Wall time of a sitting: the speed of its steps, and how much of it went into them."""

    def __init__(self, begun: float, earlier: Earlier = Earlier()) -> None:
        """`begun`: when the sitting began, by `time.perf_counter`."""
        self._begun, self._earlier = begun, earlier
        self._since, self._paused, self._in_steps = begun, 0.0, 0.0

    def start(self) -> None:
        """The next lap begins now."""
        self._since, self._paused = time.perf_counter(), 0.0

    def lap(self, steps: int) -> float:
        """Seconds a step since the last lap, pauses left out."""
        now = time.perf_counter()
        spent = max(now - self._since - self._paused, 1e-9)
        self._in_steps += spent
        self._since, self._paused = now, 0.0
        return spent / max(steps, 1)

    def __enter__(self) -> None:
        """Begin a pause: what follows is not part of a step."""
        self._pause = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._paused += time.perf_counter() - self._pause

    @property
    def sitting(self) -> int:
        """Which sitting of the run this is, from 1."""
        return self._earlier.sittings + 1

    @property
    def wall(self) -> float:
        """Seconds since this sitting began."""
        return time.perf_counter() - self._begun

    @property
    def goodput(self) -> float:
        """The share of this sitting's time spent in steps."""
        return self._in_steps / max(self.wall, 1e-9)

    @property
    def run_goodput(self) -> float:
        """The share of all sittings' time spent in steps that count."""
        earlier = self._earlier
        return (earlier.steps + self._in_steps) / max(earlier.wall + self.wall, 1e-9)

    @property
    def summary(self) -> str:
        """The share of this sitting, and of all if there were others."""
        others = f" ({self.run_goodput:.0%} over {self.sitting} sittings)"
        return f"{self.goodput:.0%}{others if self.sitting > 1 else ''}"


def earlier_sittings(metrics: Path, step: int) -> Earlier:
    """What metrics.jsonl tells of the sittings that led to `step`; nothing of older versions' runs.

    Args:
      metrics: the file, which need not exist.
      step: the last step that the coming sitting will not make again.
    """
    walls: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for record in _records(metrics):
        if "seconds" in record:
            seconds[record["step"]] = record["seconds"]
        if SITTING in record:
            walls[record[SITTING]] = record[WALL]
    if not walls:
        return Earlier()
    in_steps = sum(spent for made, spent in seconds.items() if made <= step)
    return Earlier(max(walls), sum(walls.values()), in_steps)


def _records(metrics: Path) -> Any:
    """The lines of a file that are whole."""
    if not metrics.is_file():
        return
    with metrics.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # cut off when the process was killed
                continue


# What the steps told, fetched from the device now and then: metrics.jsonl and the console's line.
#
# Does not know what to do about a step that was not finite; it says which one it was.


class Reporter:
    """Collects what steps tell and reports it in portions."""

    def __init__(
        self,
        config: Config,
        devices: list[jax.Device],
        metrics: MetricsFile,
        console: Console,
        clock: StepClock,
    ):
        self._config, self._devices, self._clock = config, devices, clock
        self._metrics, self._console = metrics, console
        self._pending: list[StepMetrics] = []  # of steps not reported yet, still on the device
        self._peak = peak_flops(devices[0], config.run.peak_flops) * len(devices)
        self._flops = flops_per_token(config.model, config.data.sequence_length)

    def add(self, metrics: StepMetrics) -> None:
        """Take what a step will tell; wait only for the one before it."""
        self._pending.append(metrics)
        jax.block_until_ready(self._pending[-2:][0])  # at most one step is queued

    def report(self, step: int) -> tuple[int, StepMetrics] | None:
        """Write and say what the steps up to `step` told; the first that was not finite, if any."""
        told, self._pending = jax.device_get(self._pending), []
        if not told:
            return None
        seconds = self._clock.lap(len(told))
        use = memory_use(self._devices)
        for number, metrics in enumerate(told, step - len(told) + 1):
            if not metrics.healthy:
                return number, metrics
            record = {
                "step": number,
                "loss": float(metrics.loss),
                "learning_rate": float(metrics.learning_rate),
                "gradient_norm": float(metrics.gradient_norm),
                "seconds": seconds,
            }
            self._metrics.write(
                record | (self._instruments(seconds, use) if number == step else {})
            )
        loss = sum(float(metrics.loss) for metrics in told) / len(told)
        self._console.progress(step, self._line(step, loss, told[-1], seconds, use))
        return None

    def _instruments(self, seconds: float, use: MemoryUse | None) -> dict[str, int | float]:
        """What the last step of a portion tells besides: speed, memory and time well spent."""
        clock, rate = self._clock, self._config.tokens_per_step / seconds
        told: dict[str, int | float] = {"tokens_per_second": rate}
        if self._peak:
            told["mfu"] = rate * self._flops / self._peak
        if use:
            told |= {"memory_gb": use.in_use / 1e9, "peak_memory_gb": use.peak / 1e9}
        told |= {"goodput": clock.goodput, "run_goodput": clock.run_goodput}
        return told | {WALL: clock.wall, SITTING: clock.sitting}

    def _line(
        self, step: int, loss: float, metrics: StepMetrics, seconds: float, use: MemoryUse | None
    ) -> str:
        """A step's line."""
        total, rate = self._config.optimizer.steps, self._config.tokens_per_step / seconds
        mfu = f"  mfu {rate * self._flops / self._peak:.1%}" if self._peak else ""
        memory = f"  mem {use.peak / 1e9:.1f} GB" if use else ""
        left = spelled_duration(seconds * (total - step))
        return (
            f"step {step:>{len(str(total))}}/{total}  loss {loss:.4f}"
            f"  lr {metrics.learning_rate:.2e}  norm {metrics.gradient_norm:.2f}"
            f"  {rate:,.0f} tok/s  {1000 * seconds:.0f} ms/step{mfu}{memory}"
            f"  goodput {self._clock.goodput:.0%}  left {left}"
        )
