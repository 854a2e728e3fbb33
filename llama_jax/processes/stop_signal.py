"""A polite stop: the first Ctrl-C or SIGTERM is remembered, the second ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


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
