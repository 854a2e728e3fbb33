"""Numbers from users: what is accepted, as what, and what the refusal says."""

from fractions import Fraction

import numpy as np
import pytest

from llama_jax.errors import UsageError, finite_number, whole_number

WRONG_KINDS = ["1", None, True, [1], 1j]


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int8(3), Fraction(3)])
def test_a_number_becomes_a_float(value):
    number = finite_number("heat", value, lambda x: x > 0, "more than 0")
    assert type(number) is float and number == 3


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_a_whole_number_becomes_an_int(value):
    number = whole_number("count", value, lambda x: x > 0, "more than 0")
    assert type(number) is int and number == 3


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, -np.inf, 10**400])
def test_another_number_is_refused(value):
    with pytest.raises(UsageError, match=r"^heat=.* is out of range; expected more than 0$"):
        finite_number("heat", value, lambda x: x > 0, "more than 0")


@pytest.mark.parametrize("value", WRONG_KINDS)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(UsageError, match=r"^heat=.* is not a number; expected more than 0$"):
        finite_number("heat", value, lambda x: x > 0, "more than 0")


@pytest.mark.parametrize("value", [0, -1, -(10**400)])
def test_another_whole_number_is_refused(value):
    with pytest.raises(UsageError, match=r"^count=.* is out of range; expected more than 0$"):
        whole_number("count", value, lambda x: x > 0, "more than 0")


@pytest.mark.parametrize("value", [*WRONG_KINDS, 3.0, np.nan, np.inf])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(UsageError, match=r"^count=.* is not an integer; expected more than 0$"):
        whole_number("count", value, lambda x: x > 0, "more than 0")


def test_the_value_is_shown_as_it_was_given_unless_it_fills_the_line():
    shown = {np.float32(-2.5): "-2.5", "hot": "'hot'", 10**20: str(10**20)}
    shown[10**400] = "1" + "0" * 58 + "…"
    for value, text in shown.items():
        with pytest.raises(UsageError, match=f"^heat={text} is"):
            finite_number("heat", value, lambda x: x < 0 and x != -2.5, "less")
