"""Recognition accepts the grammar's own stories and rejects inconsistent ones."""

import re

import pytest
from story_recognition import is_from_grammar

from llama_jax.data.stories import stories
from llama_jax.data.stories.grammar import Plot, script, table

PEOPLE = table("hero / he / his\nTim / he / his\nAnna / she / her")
TOYS = table("toy / look / end\nball / red, old / rolled to {hero}\nduck / soft / lay in {his} bed")
LOST = Plot(
    (PEOPLE, TOYS),
    script(
        """
        - {hero} had {a look} {toy}.
        - {hero} liked {his} {toy}.

        - One day, the {toy} was gone. {He} cried.

        - Then the {toy} {end}.
        - At last, it {end}!
        - {He} saw something {look}. It was the {toy}!
        """
    ),
)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_generated_stories_are_accepted(split):
    assert all(is_from_grammar(story) for story in stories(split, 400, seed=3))


@pytest.mark.parametrize(
    "story",
    [
        "Tim had a red ball. One day, the ball was gone. He cried. Then the ball rolled to Tim.",
        "Tim had an old ball. One day, the ball was gone. He cried. At last, it rolled to Tim!",
        "Anna liked her duck. One day, the duck was gone. She cried. At last, it lay in her bed!",
        "Tim had a red ball. One day, the ball was gone. He cried. He saw something red. It was the"
        " ball!",
    ],
)
def test_all_wordings_of_a_plot_are_accepted(story):
    assert is_from_grammar(story, [LOST])


@pytest.mark.parametrize(
    "story",
    [
        # Another thing, another person, another row's look, another row's end.
        "Tim had a red ball. One day, the duck was gone. He cried. Then the duck lay in his bed.",
        "Tim had a red ball. One day, the ball was gone. She cried. Then the ball rolled to Tim.",
        "Tim had a red ball. One day, the ball was gone. He cried. Then the ball rolled to Anna.",
        "Tim had a soft ball. One day, the ball was gone. He cried. Then the ball rolled to Tim.",
        "Tim liked his ball. One day, the ball was gone. He cried. At last, it lay in his bed!",
        # Another look of the same row.
        "Tim had a red ball. One day, the ball was gone. He cried. He saw something old. It was the"
        " ball!",
        # A wrong article, a beat too few, a beat twice, no end, more than the end, nothing.
        "Tim had a old ball. One day, the ball was gone. He cried. At last, it rolled to Tim!",
        "Tim had a red ball. Then the ball rolled to Tim.",
        "Tim liked his ball. Tim had a red ball. One day, the ball was gone. He cried. At last, it"
        " rolled to Tim!",
        "Tim had a red ball. One day, the ball was gone. He cried.",
        "Tim had a red ball. One day, the ball was gone. He cried. At last, it rolled to Tim! Bye.",
        "",
    ],
)
def test_inconsistent_stories_are_rejected(story):
    assert not is_from_grammar(story, [LOST])


def test_one_unknown_word_is_rejected():
    for story in stories("train", 100, seed=3):
        words = list(re.finditer(r"\w+", story))
        middle = words[len(words) // 2]
        changed = f"{story[: middle.start()]}xyzzy{story[middle.end() :]}"
        assert not is_from_grammar(changed)
