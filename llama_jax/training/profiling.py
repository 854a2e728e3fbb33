"""A trace of a few steps of a run, written by JAX's profiler into the run's folder.

Process 0 traces its devices. Outside the window this costs a comparison per step; inside, the
device is waited for at both ends only, so that the trace holds exactly these steps and what
validation and saving between them take.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from llama_jax.errors import UsageError, first_line, warn

FOLDER = "profile"  # in the run's folder
EXPECTED = "expected START:STOP, such as 10:13 for steps 11 to 13"


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps `start` + 1 to `stop` of a run, counted from 1."""

    start: int
    stop: int

    def __str__(self) -> str:
        first = self.start + 1
        return f"step {first}" if first == self.stop else f"steps {first} to {self.stop}"


def parse_window(text: str, steps: int) -> Window:
    """Parse the value of `--profile` for a run of `steps` steps.

    Raises:
      UsageError: if it is not a window of that run.
    """
    numbers = text.split(":")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise UsageError(f"--profile {text!r} cannot be parsed; {EXPECTED}")
    start, stop = map(int, numbers)
    if start >= stop:
        raise UsageError(f"--profile {text!r} is empty; {EXPECTED}")
    if stop > steps:
        raise UsageError(
            f"--profile {text!r} goes beyond the run of optimizer.steps={steps}; end it at {steps}"
            " or before"
        )
    return Window(start, stop)


class Profiler:
    """Traces the steps of a window; without one it does nothing."""

    def __init__(self, window: Window | None, folder: Path, print_line: Callable[[str], None]):
        """`folder`: the run's; `print_line`: takes a line for the console."""
        self._window = window if jax.process_index() == 0 else None
        self._folder, self._print_line = folder / FOLDER, print_line
        self._is_tracing = False

    def skip_to(self, step: int) -> None:
        """Drop a window that is over before the first step of this session, with a line."""
        if self._window and self._window.stop <= step:
            self._print_line(f"profile   {self._window} were made in an earlier session: no trace")
            self._window = None

    def is_due(self, step: int) -> bool:
        """Return whether a trace starts or stops after `step` steps."""
        window = self._window
        if window is None:
            return False
        return step >= window.stop if self._is_tracing else window.start <= step < window.stop

    def toggle(self, step: int) -> None:
        """Start or stop the trace; all `step` steps must have finished on the device."""
        if self._is_tracing:
            self.close(step)
        elif self._window:
            self._window = Window(step, self._window.stop)
            # the Perfetto file opens in a browser with nothing installed
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._is_tracing = True

    def step(self, number: int) -> AbstractContextManager[object]:
        """Return a context manager that marks a step in the trace."""
        if self._is_tracing:
            return jax.profiler.StepTraceAnnotation("step", step_num=number)
        return contextlib.nullcontext()

    def close(self, step: int) -> None:
        """Stop a running trace, and say what is in it and how to open it."""
        if not self._is_tracing or self._window is None:
            return
        traced, self._window, self._is_tracing = Window(self._window.start, step), None, False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # such as a full disk, which must not end the run
            warn(f"the profile of {traced} could not be written: {first_line(error)}")
            return
        self._print_line(
            f"profile   {traced} in {self._folder}; open with: pip install xprof &&"
            f" xprof --port 8791 {self._folder}  (or open the perfetto_trace.json.gz in it at"
            " https://ui.perfetto.dev)"
        )
