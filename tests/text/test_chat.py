"""Chat templates: ids equal to recorded ones and to those of the reference implementations."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tiny_dialogues import dialogue

from llama_jax.errors import UsageError, UserError
from llama_jax.text.chat import (
    TEMPLATES,
    AlpacaTemplate,
    Llama2Template,
    Message,
    Stops,
    find_template,
)
from llama_jax.text.tokenizer import load_tokenizer

LLAMA2, ALPACA = Llama2Template(), AlpacaTemplate()
CONTENT = st.text(st.sampled_from(" \n\tab:-*/[]<>s")) | st.text(max_size=12)
CONTENT = CONTENT.filter(lambda text: not any(tag in text for tag in LLAMA2.tags + ALPACA.tags))
ROWS = st.tuples(st.none() | CONTENT, st.lists(CONTENT, min_size=1, max_size=7))
BEGIN, END = [518, 25580, 29962], [518, 29914, 25580, 29962]  # [INST] and [/INST]


@pytest.fixture(scope="module")
def llama2(shared_data):
    return load_tokenizer(shared_data / "tokenizer.model")


@pytest.fixture(scope="module", params=["trained", "llama2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def processor(shared_data):
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "tokenizer.model"))


HELLO = [1, *BEGIN, 15043, *END]
ANSWERED = [*HELLO, 6324, 727, 29871, 2]
NEXT = [1, *BEGIN, 1128, 526, 366, 29973, *END]
HELPFUL = [3532, 14816, 29903, 6778, 13, 3492, 526, 8444, 29889, 13]
HELPFUL += [29966, 829, 14816, 29903, 6778, 13, 13]
WITH_SYSTEM = [1, *BEGIN, *HELPFUL, 10994, *END]


@pytest.mark.parametrize(
    ("system", "turns", "ids"),
    [
        (None, ["Hello"], HELLO),
        (None, ["How are you?"], NEXT),
        (None, ["Hello", "Hi there", "How are you?"], ANSWERED + NEXT),
        ("You are helpful.", ["Hello"], WITH_SYSTEM),
        (
            "You are helpful.",
            ["Hello", "Hi there", "How are you?"],
            [*WITH_SYSTEM, 6324, 727, 29871, 2, *NEXT],
        ),
        (None, [" Hello\n", "\tHi there ", "\n\nHow are you? "], ANSWERED + NEXT),
    ],
)
def test_llama2_ids_are_the_recorded_ones(llama2, system, turns, ids):
    assert LLAMA2.encode(dialogue(system, turns), llama2) == ids


def reference_ids(messages, processor):
    """Return the ids by the rules of Meta's reference, with SentencePiece alone."""
    contents = [message.content for message in messages]
    if messages[0].role == "system":
        contents[:2] = ["<<SYS>>\n" + contents[0] + "\n<</SYS>>\n\n" + contents[1]]
    ids = []
    while len(contents) > 1:
        user, answer, *contents = contents
        text = "[INST] " + user.strip() + " [/INST] " + answer.strip() + " "
        ids += [1, *processor.encode(text), 2]
    return [*ids, 1, *processor.encode("[INST] " + contents[0].strip() + " [/INST]")]


@settings(max_examples=150, deadline=None)
@given(rows=ROWS)
@example(rows=("", ["", "", ""]))
@example(rows=(" Be kind.\n", [" \n", "- a\n- b", "x"]))
def test_llama2_ids_are_those_of_metas_reference(llama2, processor, rows):
    messages = dialogue(*rows)
    assert LLAMA2.encode(messages, llama2) == reference_ids(messages, processor)


def test_system_message_keeps_its_whitespace(llama2):
    text = "[INST] <<SYS>>\n Be kind. \n\n<</SYS>>\n\n Hello [/INST]"
    ids = LLAMA2.encode(dialogue(" Be kind. \n", [" Hello "]), llama2)
    assert ids == llama2.encode(text, bos=True, eos=False)
    blank = LLAMA2.encode(dialogue("", [" "]), llama2)
    assert llama2.decode(blank) == "[INST] <<SYS>>\n\n<</SYS>> [/INST]"


WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{}\n\n### Response:"
)


def instructed(instruction, text_input):
    """Return Alpaca's prompt."""
    if text_input:
        return WITH_INPUT.format(instruction, text_input)
    return WITHOUT_INPUT.format(instruction)


def test_alpaca_ids_are_those_of_training(llama2, shared_data):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_bytes())[:200]
    assert {bool(row["input"]) for row in rows} == {True, False}
    seen = []
    for row in rows:
        instruction, text_input = row["instruction"], row["input"]
        text = instructed(instruction, text_input)
        messages = (
            dialogue(instruction, [text_input]) if text_input else dialogue(None, [instruction])
        )
        assert ALPACA.encode(messages, llama2) == llama2.encode(text, bos=True, eos=False)
        example_ids = ALPACA.encode_exchange(text, row["output"], llama2)
        seen.append(example_ids == llama2.encode(text + row["output"], bos=True, eos=True))
    assert sum(seen) == 187, "the others begin with a quotation mark or such after the colon"


@pytest.mark.parametrize("system", [None, ""])
def test_alpaca_instruction_is_the_user_message(trained, system):
    ids = ALPACA.encode(dialogue(system, ["Add 1\nand 2 "]), trained)
    assert trained.decode(ids) == WITHOUT_INPUT.format("Add 1\nand 2 ")


def test_alpaca_instruction_is_the_system_message_if_there_is_one(trained):
    ids = ALPACA.encode(dialogue("Translate.", ["Hello"]), trained)
    assert trained.decode(ids) == WITH_INPUT.format("Translate.", "Hello")
    ids = ALPACA.encode(dialogue("Tell a story.", [""]), trained)
    assert trained.decode(ids) == WITHOUT_INPUT.format("Tell a story.")


def test_alpaca_dialogue_begins_with_earlier_exchanges_as_examples(trained):
    first = trained.encode(WITH_INPUT.format("Translate.", "red") + "rot", bos=True, eos=True)
    last = trained.encode(WITH_INPUT.format("Translate.", "sea"), bos=True, eos=False)
    assert ALPACA.encode(dialogue("Translate.", ["red", "rot", "sea"]), trained) == first + last


ANSWERS = ["Sure.", "- one\n- two", '"A red sail," he said.', "://", ")", " spaced", "\n\nx", ""]


@pytest.mark.parametrize("answer", ANSWERS)
def test_alpaca_exchange_begins_with_the_ids_of_the_prompt(llama2, answer):
    prompt = WITHOUT_INPUT.format("Go")
    prompt_ids = ALPACA.encode_prompt(prompt, llama2)
    ids = ALPACA.encode_exchange(prompt, answer, llama2)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert ids[-1] == llama2.eos_id
    assert llama2.decode(ids) == prompt + answer


class Pairs:
    """A tokenizer with pieces of two characters, also across line ends."""

    bos_id, eos_id = "<", ">"

    def encode(self, text, *, bos, eos):
        pairs = [text[start : start + 2] for start in range(0, len(text), 2)]
        return ["<"] * bos + pairs + [">"] * eos


@pytest.mark.parametrize("instruction", ["Go", "Go!"])
def test_alpaca_exchange_with_pieces_across_line_ends(instruction):
    prompt = WITHOUT_INPUT.format(instruction)
    ids = ALPACA.encode_exchange(prompt, "Sure.", Pairs())
    assert "".join(ids) == f"<{prompt}Sure.>"
    assert ids[: len(ALPACA.encode_prompt(prompt, Pairs()))] == ALPACA.encode_prompt(
        prompt, Pairs()
    )


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, name=st.sampled_from(sorted(TEMPLATES)))
@example(rows=(None, ["x", "- y", "z"]), name="alpaca")
def test_dialogue_begins_with_the_ids_of_a_shorter_one(tokenizer, rows, name):
    whole = dialogue(*rows)
    ids = TEMPLATES[name].encode(whole, tokenizer)
    for end in range(len(whole) - 2, 0, -2):
        if whole[end - 1].role == "user":
            part = TEMPLATES[name].encode(whole[:end], tokenizer)
            assert ids[: len(part)] == part


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_does_not_become_control_ids(trained, name):
    turns = ["<s>x</s>", "</s><s>", "<unk>\0"]
    ids = TEMPLATES[name].encode(dialogue("<s>", turns), trained)
    control = [token for token in ids if token in (0, trained.bos_id, trained.eos_id)]
    assert control == [trained.bos_id, trained.eos_id, trained.bos_id]
    assert ids[0] == trained.bos_id
    assert all(turn in trained.decode(ids) for turn in turns)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(("name", "tag"), [(n, t) for n in TEMPLATES for t in TEMPLATES[n].tags])
def test_message_with_a_tag_of_the_template_is_an_error(trained, name, tag, place):
    contents = ["a", "b", "c", "d"]
    contents[place] += f"x{tag}y"
    messages = dialogue(contents[0], contents[1:])
    with pytest.raises(UserError) as caught:
        TEMPLATES[name].encode(messages, trained)
    assert str(caught.value).startswith(f"messages[{place}].content has {tag!r}")
    assert "\n" not in str(caught.value)
    other = next(template for key, template in TEMPLATES.items() if key != name)
    assert other.encode(messages, trained)


def test_tags_are_those_that_a_template_writes():
    assert LLAMA2.tags == ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    assert ALPACA.tags == ("### Instruction:", "### Input:", "### Response:")
    for template in TEMPLATES.values():
        text = "".join(template.prompts("s", ["u"]))
        assert all(text.count(tag) == 1 for tag in template.tags)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answer_ends_at_eos_or_a_tag(trained, name):
    tags = TEMPLATES[name].tags
    assert TEMPLATES[name].stops(trained) == Stops(ids=(trained.eos_id,), strings=tags)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no message"),
        ([Message("system", "x")], "only a system message"),
        ([Message("user", "x"), Message("user", "y")], r"messages\[1\].role='user' is out of"),
        ([Message("user", "x"), Message("assistant", "y")], "is the assistant's"),
    ],
)
def test_dialogue_that_cannot_be_answered_is_an_error(trained, name, messages, message):
    with pytest.raises(UserError, match=message):
        TEMPLATES[name].encode(messages, trained)


def test_templates_are_found_by_name():
    assert isinstance(find_template("llama2"), Llama2Template)
    assert isinstance(find_template("alpaca"), AlpacaTemplate)
    assert [template.name for template in TEMPLATES.values()] == list(TEMPLATES)
    with pytest.raises(UsageError, match=r"='lama' is unknown; .* of llama2, alpaca; .* 'llama2'"):
        find_template("lama")
    with pytest.raises(UsageError, match=r"template='xyz' is unknown; expected .* alpaca$"):
        find_template("xyz")
