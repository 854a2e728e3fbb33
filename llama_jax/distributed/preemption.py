"""Orderly stops: the first Ctrl-C, SIGTERM or SIGHUP is recorded, a second ends the process.

SIGHUP, of a terminal that was closed, is left alone where it is ignored, as under nohup. It never
counts as the second signal: a shell and the kernel may both send it.

Several processes stop at the same step, whichever of them gets the signal: JAX's preemption service
listens for SIGTERM, informs the other processes in the background, and agrees with them on the next
step that all can reach. Asking it sends nothing over the network.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax

SIGHUP = getattr(signal, "SIGHUP", None)  # None on Windows


class StopSignal:
    """Whether this process should stop, and the signal that caused it."""

    def __init__(self, farewell: Callable[[], str] | None = None) -> None:
        """`farewell`: returns the line to print on stderr when a second signal ends the process."""
        self.number = 0  # of the signal; 0: none yet
        self._farewell = farewell

    def requested(self) -> bool:
        """Return whether to stop now."""
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """The exit code that a shell expects after the signal: 129, 130 or 143."""
        return 128 + self.number

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.number:
            self.number = number
        elif number != SIGHUP:
            self.end(number, _frame)

    def end(self, number: int, _frame: FrameType | None) -> None:
        """End the process at once, with the farewell."""
        with contextlib.suppress(Exception):
            if self._farewell:  # unbuffered: the signal may have interrupted a write to stderr
                os.write(2, f"{self._farewell()}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)


class SharedStop(StopSignal):
    """Whether all processes should stop, at the same step."""

    def __init__(self, farewell: Callable[[], str] | None = None) -> None:
        super().__init__(farewell)
        self._calls, self._is_agreed = 0, False

    def requested(self) -> bool:
        """Return whether all stop now; all processes have to call this equally often."""
        if not self._is_agreed:
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._calls += 1
            self._is_agreed = reached_preemption_sync_point(self._calls)
            if self._is_agreed:
                signal.signal(signal.SIGTERM, self.end)
        return self._is_agreed

    @property
    def exit_code(self) -> int:
        """130 on a process that got Ctrl-C, 129 on one whose terminal was closed, else 143."""
        return 128 + (self.number or signal.SIGTERM)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle Ctrl-C or SIGHUP: the first is passed on as SIGTERM, a second ends the process."""
        if self._is_agreed and number != SIGHUP:
            self.end(number, frame)
        is_first = not self.number and not self._is_agreed
        super().handle(number, frame)
        if is_first:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_signal(farewell: Callable[[], str] | None = None) -> Iterator[StopSignal]:
    """Catch Ctrl-C, SIGTERM and SIGHUP in this process while the block runs; see `StopSignal`."""
    stop = StopSignal(farewell)
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield stop
        return
    with _handlers(stop, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextlib.contextmanager
def stop_of_all(farewell: Callable[[], str] | None = None) -> Iterator[StopSignal]:
    """Catch Ctrl-C, SIGTERM and SIGHUP; one signal to any process stops all of them."""
    if jax.process_count() == 1:
        with stop_signal(farewell) as stop:
            yield stop
        return
    shared = SharedStop(farewell)
    with _handlers(shared, signal.SIGINT):
        yield shared


@contextlib.contextmanager
def _handlers(stop: StopSignal, *numbers: signal.Signals) -> Iterator[None]:
    """Let `stop` handle signals while the block runs, SIGHUP among them unless it is ignored."""
    if SIGHUP is not None and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
        numbers += (SIGHUP,)
    previous = {number: signal.signal(number, stop.handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
