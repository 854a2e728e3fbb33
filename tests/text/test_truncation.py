"""Truncation: as few of the oldest exchanges as possible are left out, with a warning."""

import pytest
from tiny_dialogues import dialogue

from llama_jax.errors import UserError
from llama_jax.text.chat import fit
from llama_jax.text.chat_formats import TEMPLATES, Llama2Format

LLAMA2 = Llama2Format()
LONG = ["one", "uno " * 5, "two", "dos " * 9, "three", "tres", "four"]


@pytest.mark.parametrize("name", ["llama2", "alpaca", "chatml", "vicuna"])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_as_few_oldest_exchanges_as_possible_are_left_out(trained, name, system):
    template, messages = TEMPLATES[name], dialogue(system, LONG)
    kept = [dialogue(system, LONG[2 * dropped :]) for dropped in range(4)]
    sizes = [len(template.encode(part, trained)) for part in kept]
    assert sorted(sizes, reverse=True) == sizes
    for room in range(sizes[-1], sizes[0] + 2):
        fitted = fit(messages, template, trained, room, truncate=True)
        dropped = next(index for index, size in enumerate(sizes) if size <= room)
        assert fitted.dropped == dropped
        assert fitted.ids == template.encode(kept[dropped], trained)
        sizes_line = f"the dialogue has {sizes[0]} tokens, but the context has room for {room}; its"
        assert fitted.statement.startswith(sizes_line) is (dropped > 0)
        exchanges = ["", "oldest exchange was", "oldest 2 exchanges", "oldest 3 exchanges"]
        assert exchanges[dropped] in fitted.statement
        assert fitted.statement.endswith(" left out") or fitted.statement == ""


def test_without_truncate_the_error_has_both_numbers(trained):
    messages = dialogue("Be kind.", LONG)
    size = len(LLAMA2.encode(messages, trained))
    assert fit(messages, LLAMA2, trained, size, truncate=False).dropped == 0
    with pytest.raises(
        UserError, match=rf"has {size} tokens, .* room for {size - 1}; .* set truncate"
    ):
        fit(messages, LLAMA2, trained, size - 1, truncate=False)
    with pytest.raises(UserError, match=r"room for 2; shorten it$"):  # nothing can be left out
        fit(messages[-1:], LLAMA2, trained, 2, truncate=False)


@pytest.mark.parametrize("turns", [LONG, LONG[-1:]])
def test_last_message_that_does_not_fit_is_an_error(trained, turns):
    messages = dialogue("Be kind.", turns)
    least = len(LLAMA2.encode(dialogue("Be kind.", turns[-1:]), trained))
    message = rf"the dialogue that cannot be left out has {least} tokens, .* room for {least - 1};"
    with pytest.raises(UserError, match=message):
        fit(messages, LLAMA2, trained, least - 1, truncate=True)


def test_messages_that_are_left_out_are_checked(trained):
    messages = dialogue(None, ["[INST]", *LONG[1:]])
    with pytest.raises(UserError, match=r"messages\[0\].content has '\[INST\]'"):
        fit(messages, LLAMA2, trained, 50, truncate=True)


class Counting:
    """A tokenizer that gives a character an id, and counts the characters."""

    def __init__(self):
        self.bos_id, self.eos_id, self.characters = 1, 2, 0
        self.special_ids = {}

    def encode(self, text, *, bos, eos):
        self.characters += len(text)
        return [1] * bos + [ord(character) for character in text] + [2] * eos


def test_a_long_history_is_fitted_in_a_few_passes():
    messages = dialogue(None, ["word " * 3] * 4001)
    once, fitting = Counting(), Counting()
    LLAMA2.encode(messages, once)
    fit(messages, LLAMA2, fitting, 300, truncate=True)
    assert fitting.characters < 4 * once.characters
