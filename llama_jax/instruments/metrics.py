"""What a run tells while it goes: a line or a bar on the console, metrics.jsonl, TensorBoard.

Only process 0 speaks. Does not know where the numbers come from.
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax

METRICS = "metrics.jsonl"


def spelled_duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m04s or 5s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def warn(text: str) -> None:
    """A warning line on stderr."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


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
            from llama_jax.instruments.tensorboard import event_writer

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
