"""Stop strings: the texts that end a completion, found while it is generated."""

import reprlib
from collections.abc import Sequence

from llama_jax.errors import UsageError


class StopStrings:
    """Cuts a text that arrives in pieces at the first stop string in it.

    The text ends as soon as any stop string is complete, however it was split into pieces; if
    several are complete at the same character, the longest is cut out. Text that may still turn out
    to be the start of a stop string is held back. Case matters.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        """Start a text.

        Args:
          stops: a text, or a list of them; an empty list never ends the text.

        Raises:
          UsageError: for stops that are not texts, or are empty.
        """
        self._stops = parse_stops(stops)
        self._held = ""  # the longest end of the text that is the start of a stop string
        self._finished = False

    def push(self, text: str) -> tuple[str, bool]:
        """Append a piece; return the text that can be shown now, and whether the text has ended.

        After the end nothing more is returned.
        """
        if self._finished:
            return "", True
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:
            end, length = min(found)  # the earliest end; of equal ones the longest stop string
            self._held, self._finished = "", True
            return text[: end + length], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return the text that was held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is the start of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def parse_stops(stops: object, most: int | None = None) -> tuple[str, ...]:
    """Return stop strings as a tuple, after checking them.

    Args:
      stops: a text, or a list of texts.
      most: the number of texts that is allowed; None: any.

    Raises:
      UsageError: for a stop that is not text or is empty, or too many of them.
    """
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, list | tuple):
        raise UsageError(
            f"stop={reprlib.repr(stops)} is not text; expected a text or a list of them"
        )
    if most is not None and len(stops) > most:
        raise UsageError(f"stop has {len(stops)} texts; expected at most {most}")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise UsageError(f"stop[{index}]={reprlib.repr(stop)} is not text; expected a text")
        if not stop:
            raise UsageError(f"stop[{index}] is empty; expected at least one character")
    return tuple(stops)
