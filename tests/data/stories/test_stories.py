"""The embedded corpus: deterministic stories, disjoint splits, and clean text."""

import re
import subprocess
import sys
from hashlib import sha256
from itertools import islice

import pytest

from llama_jax.data.stories import stories
from llama_jax.data.stories.grammar import Plot, Slots, script, table
from llama_jax.data.stories.plots import BOYS as BOY_NAMES
from llama_jax.data.stories.plots import GIRLS as GIRL_NAMES
from llama_jax.data.stories.plots import HOMES, OPENING, cast, parse_plots

GIRLS, BOYS = set(GIRL_NAMES), set(BOY_NAMES)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Thirty thousand training stories."""
    return list(stories("train", 30_000))


@pytest.fixture(scope="module")
def sample(corpus: list[str]) -> list[str]:
    """Return enough stories to contain every wording many times."""
    return corpus[:6_000]


def digest(split: str, seed: int) -> str:
    """A fingerprint of the first 200 stories."""
    return sha256("\n".join(stories(split, 200, seed)).encode()).hexdigest()


def test_same_arguments_give_the_same_stories() -> None:
    assert digest("train", 3) == digest("train", 3)
    assert len({digest("train", seed) for seed in (-1, 0, 1)}) == 3


def test_longer_run_begins_with_the_shorter_one(corpus: list[str]) -> None:
    assert list(islice(stories("train", 1_000_000), 50)) == corpus[:50]


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_python_hash_seed_has_no_influence(hash_seed: str) -> None:
    program = (
        "import sys; from llama_jax.data.stories import stories;"
        "sys.stdout.write('\\n'.join(stories('validation', 200, 5)))"
    )
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    ).stdout
    assert sha256(output).hexdigest() == digest("validation", 5)


def test_stories_are_distinct(corpus: list[str]) -> None:
    assert len(set(corpus)) == 30_000


def test_splits_share_no_story_whatever_the_seed(corpus: list[str]) -> None:
    held_out = set(stories("validation", 500)) | set(stories("validation", 500, seed=7))
    assert len(held_out) > 900
    assert held_out.isdisjoint(corpus)


def test_count_zero_gives_no_stories() -> None:
    assert list(stories("train", 0)) == []


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("test", 1, r"split is 'test'; expected one of \['train', 'validation'\]"),
        ("train", -1, "count is -1; expected 0 to 1000000"),
        ("train", 1_000_001, "count is 1000001; expected 0 to 1000000"),
        ("validation", 50_001, "count is 50001; expected 0 to 50000"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(split: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stories(split, count)


def test_vocabulary_is_wide_and_yet_small(sample: list[str]) -> None:
    words = {word for story in sample for word in re.findall("[a-z]+", story.lower())}
    assert 600 <= len(words) <= 1200


def test_stories_are_short(corpus: list[str]) -> None:
    lengths = [len(story.split()) for story in corpus]
    assert min(lengths) >= 75
    assert max(lengths) <= 130


def test_most_stories_open_with_once_upon_a_time(sample: list[str]) -> None:
    assert sum(story.startswith("Once upon a time,") for story in sample) > len(sample) / 2


@pytest.mark.parametrize(
    "flaw",
    [
        r"[^ -~]",  # anything but a line of plain ASCII
        r"[{}|/\\]",  # an unfilled slot or a table separator
        r"  |^ | $| [.,!?]|[.,!?][A-Za-z]",  # spacing
        r"\.\.|,,|[,.!?] ?,|!\.|\?\.",  # doubled punctuation
        r"(?i)\b(?:a [aeiou]|an [^aeiou])",  # the wrong article
        r"\.\"? \"?[a-z]",  # a sentence that begins small
        r"\b(?!hoo)(\w+) \1\b(?!!| tap)",  # a word said twice, but for noises
        r"[^.!?\"]$|[^.!?]\"$",  # no end
    ],
)
def test_writing_is_clean(sample: list[str], flaw: str) -> None:
    assert [story for story in sample if re.search(flaw, story)][:3] == []


def test_quotes_open_and_close(sample: list[str]) -> None:
    for story in sample:
        pieces = story.split('"')
        assert len(pieces) % 2 == 1, story
        assert all(spoken[-1] in ".,!?" for spoken in pieces[1::2]), story
        assert all(text[-1] == " " for text in pieces[:-1:2] if text), story


def test_hero_stays_until_the_end(sample: list[str]) -> None:
    for story in sample:
        hero = next(word for word in re.findall(r"\w+", story) if word in GIRLS | BOYS)
        assert hero in story[len(story) // 2 :], story


@pytest.mark.parametrize(
    ("others", "strangers"),
    [(BOYS, r"\b(?:he|him|his)\b"), (GIRLS, r"\b(?:she|her)\b")],
    ids=["girls alone", "boys alone"],
)
def test_pronouns_belong_to_someone(sample: list[str], others: set[str], strangers: str) -> None:
    alone = [story for story in sample if others.isdisjoint(re.findall(r"\w+", story))]
    assert len(alone) > 500
    assert [story for story in alone if re.search(strangers, story, re.IGNORECASE)][:3] == []


def test_hero_and_friend_take_different_pronouns(sample: list[str]) -> None:
    for story in sample:
        present = set(re.findall(r"\w+", story))
        assert len(present & GIRLS) <= 1, story
        assert len(present & BOYS) <= 1, story


def test_slots_add_articles_and_capitals() -> None:
    slots = Slots(fruit="apple", he="she", toy="red ball")
    assert "{He} had {a fruit}. {A toy}!".format_map(slots) == "She had an apple. A red ball!"
    with pytest.raises(KeyError):
        "{a tool}".format_map(slots)


def test_rows_and_beats_keep_their_choices() -> None:
    assert table("toy / look\nball / red, blue") == (
        (("toy", ("ball",)), ("look", ("red", "blue"))),
    )
    assert script("- One\n  line.\n- Two.\n\n- Three.") == (("One line.", "Two."), ("Three.",))


def test_plots_are_parsed_in_the_order_of_their_file() -> None:
    text = "== a toy\ncast: Lily, Tim, Dad\nHOMES\n\ntoy / look\nball \\\n/ red\n\nOPENING\n\n"
    text += "- {A toy}.\n"
    first, second = parse_plots(text + "\n" + text.replace("Lily", "Mia"))
    assert first.tables == (cast("Lily", "Tim", "Dad"), HOMES, table("toy / look\nball / red"))
    assert first.beats == (*OPENING, ("{A toy}.",))
    assert second.tables[0] == cast("Mia", "Tim", "Dad")


def test_mistakes_in_a_plot_are_named() -> None:
    toys = table("toy / look\nball / red")
    with pytest.raises(ValueError, match="has 1 cells; expected 2"):
        table("toy / look\nball")
    with pytest.raises(ValueError, match="expected lines that begin"):
        script("A line.")
    with pytest.raises(ValueError, match="uses the slot 'tool'"):
        Plot((toys,), script("- {A tool} and {a toy}."))
