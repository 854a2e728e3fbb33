"""The commands. Ctrl-C while Python still imports them ends the process without a traceback."""

import sys
from typing import Any


def _report_but_interrupts(
    kind: type[BaseException], *error: Any, report: Any = sys.excepthook
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        report(kind, *error)


sys.excepthook = _report_but_interrupts
