"""Texts that end a completion, found as it grows, without ever showing a part of one.

Knows neither tokens nor models: text in, text out.
"""

import reprlib
from collections.abc import Sequence

from llama_jax.errors import UsageError


class StopStrings:
    """Cuts one growing text at the first stop string in it.

    The text ends as soon as any stop string is complete, wherever the text was split; if several
    are complete at the same character, the longest, which began first, is cut out. Text that may
    still turn out to be a part of a stop string is held back. Upper and lower case differ.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        """Start a text.

        Args:
          stops: a text, or a list of them; an empty list never ends the text.

        Raises:
          UsageError: for stops that are not texts, or are empty.
        """
        self._stops = parse_stops(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each that the text ends with
        self._held = ""
        self._finished = False

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now that the text has grown, and whether a stop string ended it.

        Once it has ended, nothing more comes out.
        """
        if self._finished:
            return "", True
        for index, character in enumerate(text):
            self._advance(character)
            complete = [n for n, stop in zip(self._matched, self._stops) if n == len(stop)]
            if complete:
                shown = self._release(text[: index + 1], max(complete))
                self._held, self._finished = "", True
                return shown, True
        return self._release(text, max(self._matched, default=0)), False

    def flush(self) -> str:
        """What was held back, once nothing more will come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _release(self, text: str, size: int) -> str:
        """The text so far that is not out yet, but for its last `size` characters, now held."""
        text = self._held + text
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def _advance(self, character: str) -> None:
        """Let each stop string match one character more, or fall back to what still matches."""
        for which, (stop, borders) in enumerate(zip(self._stops, self._borders)):
            matched = self._matched[which]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            self._matched[which] = matched + (stop[matched] == character)


def _borders(stop: str) -> list[int]:
    """For each beginning of a text, how much of its end is also its start, itself excepted."""
    borders = [0]
    for character in stop[1:]:
        size = borders[-1]
        while size and stop[size] != character:
            size = borders[size - 1]
        borders.append(size + (stop[size] == character))
    return borders


def parse_stops(stops: object, most: int | None = None) -> tuple[str, ...]:
    """The stop strings that a user gave, `most` at most.

    Raises:
      UsageError: naming the one that is not text, or is empty, or how many there are.
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
