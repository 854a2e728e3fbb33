"""Dialogues to train on: ids, and which of them are trained, by named formats and Jinja."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from tiny_dialogues import dialogue
from tiny_tokenizer import library_of

from llama_jax.errors import UsageError, UserError
from llama_jax.text.chat import Message
from llama_jax.text.chat_formats import TEMPLATES
from llama_jax.text.jinja_template import JinjaTemplate
from llama_jax.text.tokenizer import load_tokenizer

JINJA = {f"jinja {name}": JinjaTemplate(each.source) for name, each in TEMPLATES.items()}
ALL = TEMPLATES | JINJA
CONTENT = st.text(st.sampled_from(' \n"-:abé'), max_size=6) | st.text(max_size=4)
CONTENT = CONTENT.filter(lambda text: "###" not in text and "[" not in text and "<" not in text)
ROWS = st.tuples(st.none() | CONTENT, st.lists(CONTENT, min_size=1, max_size=3))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    library = library_of("smollm")
    library.add_special_tokens(list(TEMPLATES["llama3"].controls))
    library.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def tokenizer(request):
    names = {"sentencepiece": "chat_tokenizer", "byte level": "byte_level"}
    return request.getfixturevalue(names[request.param])


def answered(system, turns):
    """Return a dialogue of these user messages, each answered by itself and more."""
    turns = [text for turn in turns for text in (turn, turn + "x")]
    return [*dialogue(system, turns), Message("assistant", turns[-1])]


def trained_texts(ids, weights, tokenizer):
    """Return the text of each run of trained tokens, and the last id of each."""
    runs, was_trained = [], 0
    for token, weight in zip(ids, weights):
        if weight:
            runs = runs if was_trained else [*runs, []]
            runs[-1].append(token)
        was_trained = weight
    return [tokenizer.decode(run).strip() for run in runs], [run[-1] for run in runs]


@pytest.mark.parametrize("name", ALL)
def test_answers_and_the_tokens_that_end_them_are_trained(tokenizer, name):
    messages = answered("Be kind.", ["Hello", "a b"])
    ids, weights = ALL[name].encode_example(messages, tokenizer)
    texts, ends = trained_texts(ids, weights, tokenizer)
    assert texts == ["Hellox", "a bx"]
    assert set(ends) <= set(ALL[name].stops(tokenizer).ids)


@pytest.mark.parametrize("name", ALL)
def test_only_the_last_answer_or_everything_is_trained_on_request(tokenizer, name):
    messages = answered(None, ["Hello", "a b"])
    ids, weights = ALL[name].encode_example(messages, tokenizer, train_on="last")
    assert trained_texts(ids, weights, tokenizer)[0] == ["a bx"]
    every = ALL[name].encode_example(messages, tokenizer, train_on="all")
    assert every == (ids, [1] * len(ids))
    with pytest.raises(UsageError, match="train_on='user' is unknown; expected one of 'answers', "):
        ALL[name].encode_example(messages, tokenizer, train_on="user")


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, name=st.sampled_from(list(ALL)))
@example(rows=(None, ["\n", "\n\n"]), name="chatml")
@example(rows=(None, ["\na", '"']), name="jinja chatml")
@example(rows=("", ["", '"b']), name="alpaca")
def test_an_example_begins_with_the_ids_of_its_prompt(tokenizer, rows, name):
    messages = answered(*rows)
    ids, weights = ALL[name].encode_example(messages, tokenizer)
    prompt = ALL[name].encode(messages[:-1], tokenizer)
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(weights) and weights[len(prompt)] == 1
    _, last = ALL[name].encode_example(messages, tokenizer, train_on="last")
    assert last[: len(prompt)] == [0] * len(prompt)
    assert last[len(prompt) :] == weights[len(prompt) :]
    _, ends = trained_texts(ids, weights, tokenizer)
    assert len(ends) == len(rows[1])
    assert set(ends) <= set(ALL[name].stops(tokenizer).ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_source_of_a_format_gives_the_same_example(tokenizer, name):
    for system, turns in ((None, ["Hello"]), ("Be kind.", ["a b", "<s>", "- e", "1\n2"])):
        messages = answered(system, turns)
        theirs = JINJA[f"jinja {name}"].encode_example(messages, tokenizer)
        assert TEMPLATES[name].encode_example(messages, tokenizer) == theirs


def test_what_follows_the_end_token_is_written_and_not_trained(byte_level):
    end = byte_level.special_ids["<|im_end|>"]
    ids, weights = TEMPLATES["chatml"].encode_example(answered(None, ["Hello"]), byte_level)
    newline = byte_level.encode("\n")
    assert ids[-2:] == [end, *newline] and weights[-2:] == [1, 0]


def test_an_end_token_is_added_where_a_template_writes_none(byte_level):
    plain = JinjaTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(
        UserError, match=r"messages\[1\] cannot be trained on: the chat template does not"
    ):
        JinjaTemplate(
            "{% for m in messages %}{{ m.content ~ loop.last }}{% endfor %}"
        ).encode_example(answered(None, ["a"]), byte_level)
    ids, weights = plain.encode_example(answered(None, ["a"]), byte_level)
    assert byte_level.decode(ids) == "user: a\nassistant: ax\n"
    assert (ids[-1], weights[-1]) == (byte_level.eos_id, 1)


def test_a_template_may_write_earlier_answers_otherwise(byte_level):
    source = "{% for m in messages %}{{ 'x' if m.role == 'assistant' and not loop.last else "
    template = JinjaTemplate(source + "m.content }}{{ eos_token }}{% endfor %}")
    messages = answered(None, ["a", "b"])
    with pytest.raises(UserError, match=r"messages\[1\] .* train on the last answer only, or "):
        template.encode_example(messages, byte_level)
    ids, weights = template.encode_example(messages, byte_level, train_on="last")
    assert trained_texts(ids, weights, byte_level) == (["bx"], [byte_level.eos_id])


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_vocabulary_without_the_control_tokens_of_a_format_is_an_error(trained, name):
    missing = " and no ".join(TEMPLATES[name].controls)
    with pytest.raises(UserError) as caught:
        TEMPLATES[name].encode_example(answered(None, ["a"]), trained)
    assert f"tokenizer.model, which has no control token {missing}; choose" in str(caught.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("messages", [[], dialogue(None, ["x"]), [Message("system", "x")]])
def test_a_dialogue_without_a_last_answer_is_an_error(byte_level, name, messages):
    with pytest.raises(UserError, match="expected the assistant's answer at its end"):
        ALL[name].encode_example(messages, byte_level)


# ---- an answer that was begun ----


@pytest.mark.parametrize("name", ALL)
def test_an_answer_that_was_begun_is_that_of_an_example_without_its_end(tokenizer, name):
    messages = [*dialogue("Be kind.", ["Hello"]), Message("assistant", "a bx")]
    ids, weights = ALL[name].encode_example(messages, tokenizer, "last")
    last = Message("assistant", "a bx  ")
    begun = ALL[name].encode_begun([*messages[:-1], last], tokenizer)
    trained = [token for token, weight in zip(ids, weights) if weight]
    count = len(begun) - weights.index(1)
    assert begun == ids[: len(begun)] and 0 < count < len(trained)
    assert tokenizer.decode(trained[:count]).strip() == "a bx"


@pytest.mark.parametrize("name", ALL)
def test_an_answer_of_nothing_is_begun_by_its_prompt(tokenizer, name):
    prompt = dialogue(None, ["Hello"])
    begun = ALL[name].encode_begun([*prompt, Message("assistant", " ")], tokenizer)
    assert begun == ALL[name].encode(prompt, tokenizer)


@pytest.mark.parametrize("name", ALL)
def test_only_an_answer_can_have_been_begun(tokenizer, name):
    with pytest.raises(UserError):
        ALL[name].encode_begun(dialogue(None, ["Hello"]), tokenizer)
