"""A trace of a few steps of a run, written by JAX's profiler into the run's folder.

Process 0 traces, with its devices. Outside the window it costs a comparison a step; within, the
device is waited for only at both ends, so that the trace holds these steps and no others, and
what validating and saving between them takes.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from llama_jax.checkpoints.layout import first_line
from llama_jax.errors import UsageError, warn

FOLDER = "profile"  # in the run's folder
START_AND_STOP = "expected START:STOP, two numbers of steps made, such as 10:13"


@dataclasses.dataclass(frozen=True)
class Window:
    """From when `start` steps are made to when `stop` are: steps start + 1 to stop."""

    start: int
    stop: int

    def __str__(self) -> str:
        first = self.start + 1
        return f"step {first}" if first == self.stop else f"steps {first} to {self.stop}"


def parse_window(text: str, steps: int) -> Window:
    """The window that `--profile` names, of a run of so many steps.

    Raises:
      UsageError: when it is no window of that run.
    """
    numbers = text.split(":")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise UsageError(f"--profile {text!r} is not understood; {START_AND_STOP}")
    start, stop = map(int, numbers)
    if start >= stop:
        raise UsageError(f"--profile {text!r} ends before it begins; {START_AND_STOP}")
    if stop > steps:
        raise UsageError(
            f"--profile {text!r} goes beyond the run of optimizer.steps={steps}; end it at {steps}"
            " or before"
        )
    return Window(start, stop)


class Profiler:
    """Traces the steps of a window; without one it does nothing."""

    def __init__(self, window: Window | None, folder: Path, say: Callable[[str], None]):
        """`folder`: the run's; `say`: takes a line for the console."""
        self._window = window if jax.process_index() == 0 else None
        self._folder, self._say = folder / FOLDER, say
        self._is_tracing = False

    def skip_to(self, step: int) -> None:
        """Say so if the window is over before the first step of this sitting."""
        if self._window and self._window.stop <= step:
            self._say(f"profile   {self._window} were made in an earlier sitting: no trace")
            self._window = None

    def is_due(self, step: int) -> bool:
        """Whether `turn` has something to do once `step` steps are made."""
        window = self._window
        if window is None:
            return False
        return step >= window.stop if self._is_tracing else window.start <= step < window.stop

    def turn(self, step: int) -> None:
        """Begin the trace, or end it; the `step` steps made must be done on the device too."""
        if self._is_tracing:
            self.close(step)
        elif self._window:
            self._window = Window(step, self._window.stop)
            # the Perfetto file opens in a browser with nothing installed
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._is_tracing = True

    def step(self, number: int) -> AbstractContextManager[object]:
        """Inside the block, a step is made; the trace marks it."""
        if self._is_tracing:
            return jax.profiler.StepTraceAnnotation("step", step_num=number)
        return contextlib.nullcontext()

    def close(self, step: int) -> None:
        """End a trace that was begun, and say what is in it and how to look at it."""
        if not self._is_tracing or self._window is None:
            return
        traced, self._window, self._is_tracing = Window(self._window.start, step), None, False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # a disk that is full, say; the run matters more
            warn(f"the profile of {traced} could not be written: {first_line(error)}")
            return
        self._say(
            f"profile   {traced} in {self._folder}; look with: pip install xprof &&"
            f" xprof --port 8791 {self._folder}  (or open the perfetto_trace.json.gz in it at"
            " https://ui.perfetto.dev)"
        )
