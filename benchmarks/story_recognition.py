"""Parsing of stories with the grammar that generates them, to measure what a model has learned.

A story that a plot can generate is consistent in its people, its things and the order of events.
"""

from collections.abc import Iterable, Iterator

from llama_jax.data.stories.grammar import Plot, Row, Slots
from llama_jax.data.stories.plots import PLOTS

Drawn = dict[int, Row]  # the row chosen from a table, by the table's number
Words = dict[str, str]  # the word in each slot
State = tuple[str, Drawn, Words]  # the remaining text, and what is known so far


def is_from_grammar(story: str, plots: Iterable[Plot] = PLOTS) -> bool:
    """Return whether one of `plots` can generate `story`, a single line of text."""
    return any(_matches(plot, (f"{story} ", {}, {})) for plot in plots)


def _matches(plot: Plot, state: State, beat: int = 0) -> bool:
    """Return whether the beats from number `beat` on can generate all of the remaining text."""
    if beat == len(plot.beats):
        return not state[0]
    return any(
        _matches(plot, further, beat + 1)
        for wording in plot.beats[beat]
        for further in _read(plot, f"{wording} ", state)
    )


def _read(plot: Plot, wording: str, state: State) -> Iterator[State]:
    """Yield every way to match `wording` at the start of the remaining text."""
    text, drawn, words = state
    literal, brace, after = wording.partition("{")
    if not text.startswith(literal):
        return
    text = text.removeprefix(literal)
    if not brace:
        yield text, drawn, words
        return
    field, _, after = after.partition("}")
    for drawn_now, words_now in _fillings(plot, field.lower().removeprefix("a "), drawn, words):
        # Substituted before matching, because a word may hold slots.
        yield from _read(plot, Slots(words_now)[field] + after, (text, drawn_now, words_now))


def _fillings(plot: Plot, slot: str, drawn: Drawn, words: Words) -> Iterator[tuple[Drawn, Words]]:
    """Yield every word for `slot` that is consistent with the rows chosen so far."""
    if slot in words:
        yield drawn, words
        return
    for number, table in enumerate(plot.tables):
        for row in [drawn[number]] if number in drawn else table:
            for word in dict(row).get(slot, ()):
                yield {**drawn, number: row}, {**words, slot: word}
