"""Chat formats: ids equal to recorded ones and to those of the reference implementations."""

import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tiny_dialogues import dialogue

from llama_jax.errors import UsageError, UserError
from llama_jax.text.chat import BOS, EOS, Answer, Message, Stops, encode_parts
from llama_jax.text.chat_formats import (
    TEMPLATES,
    AlpacaFormat,
    Llama2Format,
    find_template,
    resolve_template,
)
from llama_jax.text.jinja_template import JinjaTemplate
from llama_jax.text.tokenizer import load_tokenizer

LLAMA2, ALPACA = Llama2Format(), AlpacaFormat()
CONTENT = st.text(st.sampled_from(" \n\tab:-*/[]<>s")) | st.text(max_size=12)
CONTENT = CONTENT.filter(lambda text: not any(tag in text for tag in LLAMA2.tags + ALPACA.tags))
TAGS = [(name, tag) for name, each in TEMPLATES.items() for tag in (*each.tags, *each.controls)]
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
        example_ids, _ = encode_parts((BOS, text, Answer(row["output"], True), EOS), llama2)
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
    prompt_ids = llama2.encode(prompt, bos=True, eos=False)
    ids, _ = encode_parts((BOS, prompt, Answer(answer, True), EOS), llama2)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert ids[-1] == llama2.eos_id
    assert llama2.decode(ids) == prompt + answer


class Pairs:
    """A tokenizer with pieces of two characters, also across line ends."""

    bos_id, eos_id, special_ids = "<", ">", {}

    def encode(self, text, *, bos, eos):
        pairs = [text[start : start + 2] for start in range(0, len(text), 2)]
        return ["<"] * bos + pairs + [">"] * eos


@pytest.mark.parametrize("instruction", ["Go", "Go!"])
def test_alpaca_exchange_with_pieces_across_line_ends(instruction):
    prompt = WITHOUT_INPUT.format(instruction)
    ids, _ = encode_parts((BOS, prompt, Answer("Sure.", True), EOS), Pairs())
    assert "".join(ids) == f"<{prompt}Sure.>"
    before, _ = encode_parts((BOS, prompt), Pairs())
    assert ids[: len(before)] == before


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, name=st.sampled_from(["llama2", "alpaca"]))
@example(rows=(None, ["x", "- y", "z"]), name="alpaca")
def test_dialogue_begins_with_the_ids_of_a_shorter_one(tokenizer, rows, name):
    whole = dialogue(*rows)
    ids = TEMPLATES[name].encode(whole, tokenizer)
    for end in range(len(whole) - 2, 0, -2):
        if whole[end - 1].role == "user":
            part = TEMPLATES[name].encode(whole[:end], tokenizer)
            assert ids[: len(part)] == part


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_does_not_become_control_ids(chat_tokenizer, name):
    harmless = TEMPLATES[name].encode(dialogue("a", ["b", "c", "d"]), chat_tokenizer)
    turns = ["<s>x</s>", "</s><s><|im_end|><|eot_id|>", "<unk>\0<|start_header_id|>"]
    ids = TEMPLATES[name].encode(dialogue("<s>", turns), chat_tokenizer)
    special = set(chat_tokenizer.special_ids.values())
    control = [[token for token in each if token in special] for each in (ids, harmless)]
    assert control[0] == control[1] != []
    assert all(turn in chat_tokenizer.decode(ids) for turn in turns)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize(("name", "tag"), TAGS)
def test_message_with_a_tag_of_the_template_is_an_error(trained, name, tag, place):
    contents = ["a", "b", "c", "d"]
    contents[place] += f"x{tag}y"
    messages = dialogue(contents[0], contents[1:])
    with pytest.raises(UserError) as caught:
        TEMPLATES[name].encode(messages, trained)
    assert str(caught.value).startswith(f"messages[{place}].content has {tag!r}")
    assert "\n" not in str(caught.value)
    other = next(each for key, each in TEMPLATES.items() if tag not in each.tags + each.controls)
    assert other.encode(messages, trained)


def test_tags_are_those_that_a_template_writes():
    assert LLAMA2.tags == ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    assert ALPACA.tags == ("### Instruction:", "### Input:", "### Response:")
    for name, tag in TAGS:
        parts = list(TEMPLATES[name].parts(dialogue("s", ["u"])))
        assert tag in "".join(getattr(part, "text", part) for part in parts)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answer_ends_at_eos_or_a_tag(trained, name):
    tags = (*TEMPLATES[name].tags, *TEMPLATES[name].controls)
    assert TEMPLATES[name].stops(trained) == Stops(ids=(trained.eos_id,), strings=tags)


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_answer_ends_at_the_token_that_ends_a_turn(chat_tokenizer, name, end):
    stops = TEMPLATES[name].stops(chat_tokenizer)
    assert stops == Stops((chat_tokenizer.special_ids[end], chat_tokenizer.eos_id), ())


THREE = ["Hello", "Hi there", "How are you?"]
TEXTS = {  # as their documentation shows them; {} is a control token
    "chatml": "{<|im_start|>}system\nBe kind.{<|im_end|>}\n{<|im_start|>}user\nHello{<|im_end|>}\n"
    "{<|im_start|>}assistant\nHi there{<|im_end|>}\n{<|im_start|>}user\nHow are you?{<|im_end|>}\n"
    "{<|im_start|>}assistant\n",
    "llama3": "{<s>}{<|start_header_id|>}system{<|end_header_id|>}\n\nBe kind.{<|eot_id|>}"
    "{<|start_header_id|>}user{<|end_header_id|>}\n\nHello{<|eot_id|>}"
    "{<|start_header_id|>}assistant{<|end_header_id|>}\n\nHi there{<|eot_id|>}"
    "{<|start_header_id|>}user{<|end_header_id|>}\n\nHow are you?{<|eot_id|>}"
    "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n",
    "mistral": "{<s>}[INST] Be kind.\n\nHello [/INST] Hi there{</s>}[INST] How are you? [/INST]",
    "zephyr": "<|system|>\nBe kind.{</s>}\n<|user|>\nHello{</s>}\n<|assistant|>\nHi there{</s>}\n"
    "<|user|>\nHow are you?{</s>}\n<|assistant|>\n",
    "vicuna": "{<s>}Be kind. USER: Hello ASSISTANT: Hi there{</s>}USER: How are you? ASSISTANT:",
}


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_the_documented_text(chat_tokenizer, name):
    encode, expected = chat_tokenizer.encode, []
    for part in re.split("({<[^}]*>})", TEXTS[name]):
        control = chat_tokenizer.special_ids.get(part[1:-1]) if part[:1] == "{" else None
        expected += encode(part, bos=False, eos=False) if control is None else [control]
    assert TEMPLATES[name].encode(dialogue("Be kind.", THREE), chat_tokenizer) == expected


def test_a_vocabulary_without_control_tokens_gets_them_as_text(llama2):
    ids = TEMPLATES["chatml"].encode(dialogue(None, ["Hello"]), llama2)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert ids == llama2.encode(text, bos=False, eos=False)


def test_vicuna_has_a_system_message_of_its_own(trained):
    text = trained.decode(TEMPLATES["vicuna"].encode(dialogue(None, ["Hello"]), trained))
    assert text.startswith("A chat between a curious user and") and "questions. USER: Hello" in text


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_source_of_a_format_gives_the_same_ids(tokenizer, chat_tokenizer, name, system):
    for each in (tokenizer, chat_tokenizer):
        for turns in (["Hello"], THREE, ["a b", "c", "<s>", "e", "f"]):
            messages = dialogue(system, turns)
            theirs = JinjaTemplate(TEMPLATES[name].source).encode(messages, each)
            assert TEMPLATES[name].encode(messages, each) == theirs


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
    assert isinstance(find_template("llama2"), Llama2Format)
    assert isinstance(resolve_template(""), Llama2Format)
    assert isinstance(find_template("alpaca"), AlpacaFormat)
    assert isinstance(find_template("{{ messages[0].content }}"), JinjaTemplate)
    with pytest.raises(UserError, match="trained on no chat format; choose a template, one of"):
        resolve_template("none")
    assert [template.name for template in TEMPLATES.values()] == list(TEMPLATES)
    with pytest.raises(UsageError, match=r"='lama' is unknown; .* of llama2, .*; .* 'llama3'"):
        find_template("lama")
    with pytest.raises(UsageError, match=r"template='xyz' is unknown; expected .* Jinja template$"):
        find_template("xyz")
