"""The grammar read backwards: whether it could have told a story, word for word.

This measures what a model has learned. A story that a plot could have told keeps its people, its
things and the order of what happens; with any of them mixed up, no plot could have told it.
"""

from collections.abc import Iterable, Iterator

from llama_jax.data.stories.grammar import Plot, Row, Slots
from llama_jax.data.stories.plots import PLOTS

Drawn = dict[int, Row]  # the row that was drawn of a table, by the table's number
Words = dict[str, str]  # the word of a slot
Reading = tuple[str, Drawn, Words]  # the text that is left, and what is known so far


def could_be_told(story: str, plots: Iterable[Plot] = PLOTS) -> bool:
    """Whether `tell` could have made `story`, a single line of text, from one of `plots`."""
    return any(_tells(plot, (f"{story} ", {}, {})) for plot in plots)


def _tells(plot: Plot, reading: Reading, beat: int = 0) -> bool:
    """Whether the beats of `plot` from number `beat` on tell all the text that is left."""
    if beat == len(plot.beats):
        return not reading[0]
    return any(
        _tells(plot, further, beat + 1)
        for wording in plot.beats[beat]
        for further in _read(plot, f"{wording} ", reading)
    )


def _read(plot: Plot, wording: str, reading: Reading) -> Iterator[Reading]:
    """Every way to read `wording` at the beginning of the text that is left."""
    text, drawn, words = reading
    literal, brace, after = wording.partition("{")
    if not text.startswith(literal):
        return
    text = text.removeprefix(literal)
    if not brace:
        yield text, drawn, words
        return
    field, _, after = after.partition("}")
    for drawn_now, words_now in _fillings(plot, field.lower().removeprefix("a "), drawn, words):
        # The word takes the place of its slot, because it may hold slots itself.
        yield from _read(plot, Slots(words_now)[field] + after, (text, drawn_now, words_now))


def _fillings(plot: Plot, slot: str, drawn: Drawn, words: Words) -> Iterator[tuple[Drawn, Words]]:
    """What may be known once `slot` has a word: all that fits the rows drawn so far."""
    if slot in words:
        yield drawn, words
        return
    for number, table in enumerate(plot.tables):
        for row in [drawn[number]] if number in drawn else table:
            for word in dict(row).get(slot, ()):
                yield {**drawn, number: row}, {**words, slot: word}
