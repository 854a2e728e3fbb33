"""What is left out of a dialogue that outgrows the context: as little as can be, and said."""

import pytest
from tiny_dialogues import dialogue

from llama_jax.errors import UserError
from llama_jax.text.chat import TEMPLATES, Llama2Template, fit

LLAMA2 = Llama2Template()
LONG = ["one", "uno " * 5, "two", "dos " * 9, "three", "tres", "four"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_the_fewest_oldest_exchanges_are_left_out(trained, name, system):
    template, messages = TEMPLATES[name], dialogue(system, LONG)
    kept = [dialogue(system, LONG[2 * dropped :]) for dropped in range(4)]
    sizes = [len(template.encode(part, trained)) for part in kept]
    assert sorted(sizes, reverse=True) == sizes
    for room in range(sizes[-1], sizes[0] + 2):
        fitted = fit(messages, template, trained, room, truncate=True)
        dropped = next(index for index, size in enumerate(sizes) if size <= room)
        assert fitted.dropped == dropped
        assert fitted.ids == template.encode(kept[dropped], trained)
        told = f"the dialogue has {sizes[0]} tokens, but the context has room for {room}; its"
        assert fitted.statement.startswith(told) is (dropped > 0)
        exchanges = ["", "oldest exchange was", "oldest 2 exchanges", "oldest 3 exchanges"]
        assert exchanges[dropped] in fitted.statement
        assert fitted.statement.endswith(" left out") or fitted.statement == ""


def test_without_truncation_a_dialogue_too_long_is_refused_with_both_numbers(trained):
    messages = dialogue("Be kind.", LONG)
    size = len(LLAMA2.encode(messages, trained))
    assert fit(messages, LLAMA2, trained, size, truncate=False).dropped == 0
    with pytest.raises(
        UserError, match=rf"has {size} tokens, .* room for {size - 1}; .* with truncate"
    ):
        fit(messages, LLAMA2, trained, size - 1, truncate=False)
    with pytest.raises(UserError, match=r"room for 2; shorten it$"):  # nothing can be left out
        fit(messages[-1:], LLAMA2, trained, 2, truncate=False)


@pytest.mark.parametrize("turns", [LONG, LONG[-1:]])
def test_a_last_message_too_long_is_refused_even_so(trained, turns):
    messages = dialogue("Be kind.", turns)
    least = len(LLAMA2.encode(dialogue("Be kind.", turns[-1:]), trained))
    message = rf"cannot be left out of the dialogue has {least} tokens, .* room for {least - 1};"
    with pytest.raises(UserError, match=message):
        fit(messages, LLAMA2, trained, least - 1, truncate=True)


def test_what_is_left_out_is_checked_all_the_same(trained):
    messages = dialogue(None, ["[INST]", *LONG[1:]])
    with pytest.raises(UserError, match=r"messages\[0\].content holds '\[INST\]'"):
        fit(messages, LLAMA2, trained, 50, truncate=True)


class Counting:
    """A tokenizer that gives a character an id, and counts the characters."""

    def __init__(self):
        self.bos_id, self.eos_id, self.characters = 1, 2, 0

    def encode(self, text, *, bos, eos):
        self.characters += len(text)
        return [1] * bos + [ord(character) for character in text] + [2] * eos


def test_a_long_history_is_fitted_in_a_few_passes():
    messages = dialogue(None, ["word " * 3] * 4001)
    once, fitting = Counting(), Counting()
    LLAMA2.encode(messages, once)
    fit(messages, LLAMA2, fitting, 300, truncate=True)
    assert fitting.characters < 4 * once.characters
