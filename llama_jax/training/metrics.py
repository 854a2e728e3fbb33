"""What a run reports while it goes: lines or a bar on the console, metrics.jsonl, trackers.

Only process 0 reports. Reporting never ends a run: a disk that is full or a terminal that is gone
costs a warning, and lines of metrics.jsonl that are damaged are skipped.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from llama_jax.checkpoints.run_folder import METRICS
from llama_jax.config import Config
from llama_jax.errors import warn
from llama_jax.files import SECONDS_BETWEEN_TICKS, SECONDS_BETWEEN_WAITS, repeated
from llama_jax.hardware.accelerators import MemoryUse, memory_use, peak_flops
from llama_jax.model.parameters import flops_per_token
from llama_jax.training.step import StepMetrics
from llama_jax.training.trackers import Trackers

Record = dict[str, Any]  # `step`, and numbers by name; `changed`: settings, [old, new] by name


def format_duration(seconds: float) -> str:
    """Format seconds as 1h02m, 3m04s or 5s."""
    rounded = round(seconds)
    hours, minutes = divmod(rounded // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rounded % 60:02d}s" if minutes else f"{rounded}s"


# Fields of a step's line that are left out on a terminal too narrow for it, in this order.
LESS_IMPORTANT = ("goodput", "mem", "norm", "lr", "mfu", "ms/step", "tok/s")


def fitted(fields: list[str], width: int) -> str:
    """Join the fields of a line, without the less important ones if it is wider than `width`."""
    for name in LESS_IMPORTANT:
        if len("  ".join(fields)) <= width:
            break
        fields = [field for field in fields if name not in field.split()]
    return "  ".join(fields)


class Console:
    """Plain lines on standard output, and on a terminal a progress bar under them."""

    def __init__(self, total: int, start: int) -> None:
        from tqdm import tqdm

        self._is_shown = jax.process_index() == 0
        self._bar = tqdm(
            total=total,
            initial=start,
            # The line has speed and time left already; tqdm's own would leave the bar no room.
            bar_format="{bar:10} {n_fmt}/{total_fmt}  {desc}",
            dynamic_ncols=True,
            disable=not (self._is_shown and sys.stderr.isatty()),
        )

    def line(self, text: str) -> None:
        """Print one line, or several."""
        if not self._is_shown:
            return
        self._bar.clear()
        encoding = sys.stdout.encoding or "utf-8"
        try:
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except (OSError, ValueError) as error:  # a closed pipe or terminal
            self._is_shown = False
            warn(f"standard output cannot be written ({error}); training goes on without it")
        self._bar.refresh()

    def progress(self, step: int, fields: list[str]) -> None:
        """Show the fields of a step, its number first: on the bar, or as a line without one."""
        if self._bar.disable:
            self.line("  ".join(fields))
            return
        counts = 10 + len(f" {step}/{self._bar.total}  ")  # the bar and the step, see `bar_format`
        width = shutil.get_terminal_size().columns - counts - 1
        self._bar.set_description_str(fitted(fields[1:], width), refresh=False)
        self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def waiting(self, task: str) -> Iterator[None]:
        """Show the time that a task takes: on the bar, or as lines without one."""
        started, is_bar = time.monotonic(), not self._bar.disable
        before = self._bar.desc if is_bar else ""
        say = self._bar.set_description_str if is_bar else self.line

        def show() -> None:
            say(f"{task}: {format_duration(time.monotonic() - started)}")

        with repeated(show, SECONDS_BETWEEN_TICKS if is_bar else SECONDS_BETWEEN_WAITS):
            yield
        if is_bar:
            self._bar.set_description_str(before, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


# ---- metrics.jsonl: one JSON object per line, with a `step` ----


class MetricsFile:
    """Appends records to a run's metrics.jsonl, and gives their numbers to trackers."""

    def __init__(self, folder: Path, config: Config | None = None):
        """Open the file to append to, and the trackers that a config sets."""
        self._path = folder / METRICS
        self._file: TextIO | None = None
        self._has_warned = False
        is_first = jax.process_index() == 0
        self._trackers = Trackers(folder, config if is_first else None)
        if is_first:
            try:
                self._file = _open_at_line_start(self._path)
            except OSError as error:
                self._warn(error)

    def write(self, record: Record) -> None:
        """Append one record."""
        if self._file is not None:
            try:
                self._file.write(json.dumps(_without_nan(record)) + "\n")
                self._file.flush()
            except OSError as error:
                self._warn(error)
        if scalars := {name: value for name, value in record.items() if isinstance(value, float)}:
            self._trackers.log(record["step"], scalars)

    def earlier_sessions(self, step: int) -> "Earlier":
        """Return the time that the sessions before this one took up to `step`; see `Earlier`."""
        records, skipped = read_records(self._path)
        if skipped:
            warn(f"skipped {skipped} damaged line{'s' * (skipped > 1)} of {self._path}")
        return earlier_sessions(records, step)

    def close(self) -> None:
        """Close what is open."""
        self._trackers.close()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            warn(f"{METRICS} cannot be written ({error.strerror}); training goes on without it")
        self._has_warned = True


def _open_at_line_start(path: Path) -> TextIO:
    """Open a file to append lines to, after ending one that a killed process left unfinished."""
    is_cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    file = path.open("a")
    file.write("\n" if is_cut else "")
    return file


def _without_nan(record: Record) -> Record:
    """Return the record with numbers that JSON lacks (NaN and infinity) as text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def read_records(path: Path) -> tuple[list[Record], int]:
    """Return the records of a metrics file, and the number of lines that are damaged or foreign.

    A line that was cut off when a process was killed does not count. A file that does not exist has
    no records.
    """
    records: list[Record] = []
    skipped = 0
    if not path.is_file():
        return records, skipped
    with path.open(errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if _is_record(record):
                records.append(record)
            elif line.strip() and not (line.startswith("{") and not line.endswith("}\n")):
                skipped += 1
    return records, skipped


def _is_record(value: Any) -> bool:
    """Return whether a JSON value is an object with a step whose other values are numbers."""
    if not isinstance(value, dict):
        return False
    step = value.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        return False
    return all(
        isinstance(number, int | float) or number in ("nan", "inf", "-inf") or name == "changed"
        for name, number in value.items()
    )


def read_metrics(folder: Path) -> dict[int, Record]:
    """Return one record per step of a run, ascending; of a step run twice, the later numbers."""
    steps: dict[int, Record] = {}
    for record in read_records(folder / METRICS)[0]:
        steps.setdefault(record["step"], {}).update(record)
    return dict(sorted(steps.items()))


# ---- where a run's wall time goes ----
#
# What is not spent in steps is spent restoring, compiling, validating, sampling and saving. Over
# several sessions, a step that was made twice counts once, and the time between sessions does not
# count at all.


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Time that earlier sessions of a run took."""

    sessions: int = 0
    wall: float = 0.0  # seconds, of each session up to its last record
    steps: float = 0.0  # seconds, of the steps that are not made again


def earlier_sessions(records: list[Record], step: int) -> Earlier:
    """Return the time of the sessions that led to `step`, the last step not made again."""
    walls: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for record in records:
        if "seconds" in record:
            seconds[record["step"]] = float(record["seconds"])
        number = record.get("session", record.get("sitting"))  # "sitting" in older versions
        if number is not None and "wall_seconds" in record:
            walls[int(number)] = float(record["wall_seconds"])
    if not walls:
        return Earlier()
    in_steps = sum(spent for made, spent in seconds.items() if made <= step)
    return Earlier(max(walls), sum(walls.values()), in_steps)


class StepClock:
    """The seconds per step of a session, and its goodput: the part of wall time spent in steps.

    As a context manager it pauses: what runs inside is not part of a step.
    """

    def __init__(self, opened: float, earlier: Earlier = Earlier()) -> None:
        """`opened`: when the session began, by `time.perf_counter`."""
        self._opened, self._earlier = opened, earlier
        self._since, self._paused, self._in_steps = opened, 0.0, 0.0

    def start(self) -> None:
        """Start the first lap."""
        self._since, self._paused = time.perf_counter(), 0.0

    def lap(self, steps: int) -> float:
        """Return the seconds per step since the last lap, without pauses."""
        now = time.perf_counter()
        spent = max(now - self._since - self._paused, 1e-9)
        self._in_steps += spent
        self._since, self._paused = now, 0.0
        return spent / max(steps, 1)

    def __enter__(self) -> None:
        self._pause = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._paused += time.perf_counter() - self._pause

    @property
    def session(self) -> int:
        """The number of this session in the run, from 1."""
        return self._earlier.sessions + 1

    @property
    def wall(self) -> float:
        """Seconds since this session began."""
        return time.perf_counter() - self._opened

    @property
    def goodput(self) -> float:
        """The part of this session's time spent in steps."""
        return self._in_steps / max(self.wall, 1e-9)

    @property
    def run_goodput(self) -> float:
        """The part of all sessions' time spent in steps that count."""
        earlier = self._earlier
        return (earlier.steps + self._in_steps) / max(earlier.wall + self.wall, 1e-9)

    @property
    def summary(self) -> str:
        """The goodput of this session, and of all if there were others."""
        others = f" ({self.run_goodput:.0%} over {self.session} sessions)"
        return f"{self.goodput:.0%}{others if self.session > 1 else ''}"


# ---- metrics of steps ----


def format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return metrics as fields of a line: fractions in percent, others with two decimals."""
    return [
        f"accuracy {value:.1%}" if name == "accuracy" else f"{name.replace('_', ' ')} {value:.2f}"
        for name, value in metrics.items()
    ]


class Reporter:
    """Collects the metrics of steps and reports them in portions."""

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
        length, is_frozen = config.data.sequence_length, config.lora.rank > 0
        self._flops = flops_per_token(config.model, length, is_frozen)

    def add(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step; wait only for those of the step before it."""
        self._pending.append(metrics)
        jax.block_until_ready(self._pending[-2:][0])  # at most one step is queued

    def report(self, step: int) -> tuple[int, StepMetrics] | None:
        """Report the pending steps up to `step`; return the first that was not finite, if any."""
        pending, self._pending = jax.device_get(self._pending), []
        if not pending:
            return None
        seconds = self._clock.lap(len(pending))
        use = memory_use(self._devices)
        for number, metrics in enumerate(pending, step - len(pending) + 1):
            if not metrics.healthy:
                return number, metrics
            record = {
                "step": number,
                "loss": float(metrics.loss),
                "learning_rate": float(metrics.learning_rate),
                "gradient_norm": float(metrics.gradient_norm),
                "seconds": seconds,
            } | {name: float(value) for name, value in metrics.others.items()}
            self._metrics.write(record | (self._speed(seconds, use) if number == step else {}))
        loss = sum(float(metrics.loss) for metrics in pending) / len(pending)
        self._console.progress(step, self._fields(step, loss, pending[-1], seconds, use))
        return None

    def _speed(self, seconds: float, use: MemoryUse | None) -> Record:
        """Return what the last step of a portion has besides: speed, memory and goodput."""
        clock, rate = self._clock, self._config.tokens_per_step / seconds
        record: Record = {"tokens_per_second": rate}
        if self._peak:
            record["mfu"] = rate * self._flops / self._peak
        if use:
            record |= {"memory_gb": use.in_use / 1e9, "peak_memory_gb": use.peak / 1e9}
        record |= {"goodput": clock.goodput, "run_goodput": clock.run_goodput}
        return record | {"wall_seconds": clock.wall, "session": clock.session}

    def _fields(
        self, step: int, loss: float, metrics: StepMetrics, seconds: float, use: MemoryUse | None
    ) -> list[str]:
        """Return the fields of a step's line."""
        total, rate = self._config.optimizer.steps, self._config.tokens_per_step / seconds
        return [
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {loss:.4f}",
            f"lr {metrics.learning_rate:.2e}",
            f"norm {metrics.gradient_norm:.2f}",
            *format_metrics(metrics.others),
            f"{rate:,.0f} tok/s",
            f"{1000 * seconds:.0f} ms/step",
            *([f"mfu {rate * self._flops / self._peak:.1%}"] if self._peak else []),
            *([f"mem {use.peak / 1e9:.1f} GB"] if use else []),
            f"goodput {self._clock.goodput:.0%}",
            f"left {format_duration(seconds * (total - step))}",
        ]
