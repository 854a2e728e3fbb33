"""The commands. Ctrl-C at any moment, also while Python imports them, is no traceback."""

import sys

TYPE_CHECKING = False  # as type checkers know it: nothing is imported before Ctrl-C is handled
if TYPE_CHECKING:
    from typing import Any


def _report_but_interrupts(
    kind: type[BaseException], *error: "Any", report: "Any" = sys.excepthook
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        report(kind, *error)


sys.excepthook = _report_but_interrupts

import os  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402


def _repeat_interrupts(unraisable: "Any", report: "Any" = sys.unraisablehook) -> None:
    """Deliver again a Ctrl-C that came inside a callback of JAX's, where Python drops it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        report(unraisable)
        return
    timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


sys.unraisablehook = _repeat_interrupts
