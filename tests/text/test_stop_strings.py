"""Stop strings against their definition, for any text, pieces and list of stops."""

import itertools
import time

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from llama_jax.errors import UsageError
from llama_jax.text.stop_strings import StopStrings, parse_stops

FEW_LETTERS = st.text("ab", max_size=30) | st.text("ab\né🙂", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6) | st.text("ab\né🙂", min_size=1), max_size=5)


def cut(text, stops):
    """Return the text before the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return text[: end - max(sizes)], True
    return text, False


def held_back(text, stops):
    """Return how many characters at the end of a text may be the start of a stop string."""
    sizes = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return max(sizes, default=0)


@settings(max_examples=400, deadline=None)
@given(text=FEW_LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
@example(text="aab", stops=["ab"], cuts=[1, 2])
@example(text="ababac", stops=["abac"], cuts=[3, 5])
@example(text="aabaaabaaac", stops=["aabaaac"], cuts=[4])
@example(text="xabcd", stops=["bc", "abcd"], cuts=[])
@example(text="xabc", stops=["c", "abc", "bc"], cuts=[2])
def test_result_does_not_depend_on_the_pieces(text, stops, cuts):
    expected, ends = cut(text, stops)
    places = [0, *sorted(min(place, len(text)) for place in cuts), len(text)]
    found, shown, finished = StopStrings(stops), "", False
    for start, end in itertools.pairwise(places):
        piece, finished = found.push(text[start:end])
        shown += piece
        assert expected.startswith(shown), "nothing of a stop string is ever shown"
        assert finished is cut(text[:end], stops)[1], "the end is seen as soon as it is there"
        if not finished:
            held = held_back(text[:end], stops)
            assert shown == text[: end - held], "and no more is held back than must be"
    assert finished is ends
    assert shown + found.flush() == expected


def test_nothing_follows_the_end():
    found = StopStrings(["END"])
    assert found.push("one EN") == ("one ", False)
    assert found.push("D two") == ("", True)
    assert found.push("three") == ("", True)
    assert found.flush() == ""
    assert found.push("four") == ("", True)


def test_held_back_text_is_flushed_once():
    found = StopStrings(["\n\nUser:"])
    assert found.push("yes\n\nUs") == ("yes", False)
    assert found.flush() == "\n\nUs"
    assert found.flush() == ""
    assert found.push("er: no") == ("er: no", False)


@pytest.mark.parametrize("stops", [[], ()])
def test_without_stop_strings_all_text_is_returned(stops):
    found = StopStrings(stops)
    assert found.push("any \n text") == ("any \n text", False)
    assert found.flush() == ""


@pytest.mark.parametrize("stops", ["ab", ["ab"], ("ab",), ["ab", "ab"]])
def test_single_text_is_one_stop_string(stops):
    assert StopStrings(stops).push("b a ab") == ("b a ", True)


def test_case_matters():
    assert StopStrings("end").push("the END.") == ("the END.", False)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        (None, r"stop=None is not text; expected a text or a list of them"),
        (7, r"stop=7 is not text"),
        (b"end", r"stop=b'end' is not text"),
        ({"a": 1}, r"stop=\{'a': 1\} is not text"),
        (["a", 3], r"stop\[1\]=3 is not text; expected a text"),
        (["a", "b", None], r"stop\[2\]=None is not text"),
        ([["a"]], r"stop\[0\]=\['a'\] is not text"),
        ("", r"stop\[0\] is empty; expected at least one character"),
        (["a", ""], r"stop\[1\] is empty"),
    ],
)
def test_error_names_the_stop_string_that_is_not_text(stops, message):
    with pytest.raises(UsageError, match=message) as caught:
        StopStrings(stops)
    assert "\n" not in str(caught.value)


def test_maximal_number_of_stop_strings():
    many = [f"{n}." for n in range(33)]
    assert StopStrings(many).push("a 32.") == ("a ", True)
    assert parse_stops(many, most=33) == tuple(many)
    with pytest.raises(UsageError, match="stop has 33 texts; expected at most 32"):
        parse_stops(many, most=32)


def test_long_partial_matches_take_little_time():
    start = time.perf_counter()
    assert StopStrings("a" * 20_000 + "b").push("a" * 40_000) == ("a" * 20_000, False)
    assert time.perf_counter() - start < 2
