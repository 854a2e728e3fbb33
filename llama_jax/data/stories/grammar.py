"""A story grammar: tables of words, plots made of beats, and the generation of a story.

A *table* is a string with one line per row. Its header names the slots that a row fills. Cells are
separated by " / ", and a cell may hold several choices, separated by commas:

    toy        / look
    ball       / red, blue, bouncy
    teddy bear / soft, brown

All slots of a table are filled from one row, so that they match: the teddy bear is never bouncy.
A *script* is a string of beats, used in order and separated by blank lines. Every beat has several
wordings, each of which begins with a dash and may span several lines:

    - {hero} had {a look} {toy}.
    - {His} best toy was {a look} {toy}.

In a wording, `{toy}` is the word of that slot, `{a look}` the word with its article, and a slot
with a capital begins a sentence. A cell may hold slots too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from textwrap import dedent
from typing import TypeVar

Choice = TypeVar("Choice")
Row = tuple[tuple[str, tuple[str, ...]], ...]
Table = tuple[Row, ...]
Beat = tuple[str, ...]


def table(text: str) -> Table:
    """Return the rows of a table: the choices for each slot.

    Raises:
      ValueError: for a row with more or fewer cells than the header.
    """
    header, *lines = [line.split("/") for line in text.strip().splitlines()]
    slots = [slot.strip() for slot in header]
    rows = [[tuple(word.strip() for word in cell.split(",")) for cell in line] for line in lines]
    for row in rows:
        if len(row) != len(slots):
            raise ValueError(f"row {row} has {len(row)} cells; expected {len(slots)}: {slots}")
    return tuple(tuple(zip(slots, row, strict=True)) for row in rows)


def script(text: str) -> tuple[Beat, ...]:
    """Return the wordings of each beat of a script; line breaks in a wording become spaces.

    Raises:
      ValueError: for a beat that does not begin with a dash.
    """
    beats = dedent(text).strip().split("\n\n")
    for beat in beats:
        if not beat.startswith("- "):
            raise ValueError(f'beat {beat!r} has no wording; expected lines that begin with "- "')
    return tuple(
        tuple(" ".join(wording.split()) for wording in beat.removeprefix("- ").split("\n- "))
        for beat in beats
    )


class Slots(dict[str, str]):
    """The words of one story by slot, with articles (`{a toy}`) and capitals (`{He}`)."""

    def __missing__(self, slot: str) -> str:
        """Return a slot's word with an article or a capital; KeyError for an unknown slot."""
        if slot[0].isupper():
            word = self[slot[0].lower() + slot[1:]]
            return word[0].upper() + word[1:]
        if slot.startswith("a "):
            word = self[slot[2:]]
            return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        raise KeyError(slot)


@dataclass(frozen=True)
class Plot:
    """A family of stories: tables of words, and beats in order."""

    tables: tuple[Table, ...]
    beats: tuple[Beat, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for a wording or a cell with a slot that no table fills."""
        rows = [row for drawn in self.tables for row in drawn]
        filled = Slots({slot: "word" for row in rows for slot, _ in row})
        cells = [word for row in rows for _, words in row for word in words]
        for text in [*cells, *(wording for beat in self.beats for wording in beat)]:
            try:
                text.format_map(filled)
            except KeyError as slot:
                raise ValueError(
                    f"{text!r} uses the slot {slot}; expected one of {sorted(filled)}"
                ) from None


def generate_story(plot: Plot, random: Random) -> str:
    """Return one story of `plot`, a single line; all choices are drawn from `random`."""
    slots = Slots()
    for drawn in plot.tables:
        for slot, choices in pick(drawn, random):
            slots[slot] = pick(choices, random)
    story = " ".join([pick(beat, random) for beat in plot.beats]).format_map(slots)
    # A second pass, because cells may hold slots.
    return story.format_map(slots) if "{" in story else story


def pick(choices: Sequence[Choice], random: Random) -> Choice:
    """Return one of `choices` with equal probability.

    Only `random.random` is guaranteed to give the same numbers in every version of Python.
    """
    return choices[int(random.random() * len(choices))]
