"""Where a run's wall time goes: seconds a step, and the share of all time spent in steps.

The rest is restoring, compiling, validating, sampling and saving. Over several sittings, a step
that was made twice counts once, and the time between sittings does not count at all.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

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
