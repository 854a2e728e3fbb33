"""A polite stop: the first Ctrl-C or SIGTERM is remembered, the second ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax


class StopSignal:
    """Which signal has asked for a stop, if any."""

    def __init__(self) -> None:
        self.number = 0

    def ask(self) -> bool:
        """Whether to stop now."""
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by that signal: 130 or 143."""
        return 128 + self.number

    def remember(self, number: int, _frame: FrameType | None) -> None:
        """The handler."""
        if self.number:
            os._exit(128 + number)
        self.number = number


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch Ctrl-C and SIGTERM inside the block."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():  # cannot be interrupted
        yield stop
        return
    previous = {
        number: signal.signal(number, stop.remember) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# A polite stop of several processes: all stop at the same step, whichever of them was signalled.
#
# JAX's preemption service listens for SIGTERM, tells the other processes in the background, and
# agrees with them on the next moment that all can reach; asking it sends nothing over the network.


class SharedStop(StopSignal):
    """Whether all processes are to stop now."""

    def __init__(self) -> None:
        super().__init__()
        self._asked, self._is_agreed = 0, False

    def ask(self) -> bool:
        """Whether all stop now. Every process must ask equally often: questions are counted."""
        if not self._is_agreed:
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._asked += 1
            self._is_agreed = reached_preemption_sync_point(self._asked)
            if self._is_agreed:
                signal.signal(signal.SIGTERM, _end)
        return self._is_agreed

    @property
    def exit_code(self) -> int:
        """130 where Ctrl-C was pressed, else 143."""
        return 128 + (self.number or signal.SIGTERM)

    def remember(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C: the first goes the way of SIGTERM, the second ends at once."""
        if self._is_agreed:
            _end(number, frame)
        super().remember(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


def _end(number: int, _frame: Any) -> None:
    os._exit(128 + number)


@contextlib.contextmanager
def stop_of_all() -> Iterator[StopSignal]:
    """Inside the block, one signal to any process stops them all; a second ends the process."""
    if jax.process_count() == 1:
        with stop_signal() as stop:
            yield stop
        return
    shared = SharedStop()
    previous = signal.signal(signal.SIGINT, shared.remember)
    try:
        yield shared
    finally:
        signal.signal(signal.SIGINT, previous)
