"""Messages: JSON, the order of roles, and the errors of everything else."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.text.chat import Message, parse_messages, split_dialogue

SYSTEM, USER, ANSWER = (Message(role, role[0]) for role in ("system", "user", "assistant"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
)


def test_json_becomes_messages():
    text = '[{"role": "system", "content": ""}, {"content": "é\\n\\u0000", "role": "user"}]'
    assert parse_messages(json.loads(text)) == [Message("system", ""), Message("user", "é\n\0")]
    assert parse_messages((USER, {"role": "assistant", "content": "a"})) == [USER, ANSWER]
    assert parse_messages([]) == []


GOOD = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (None, r"messages=None is not a list; expected a list of messages"),
        ("Hello", r"messages='Hello' is not a list"),
        (GOOD, r"messages=\{.*\} is not a list"),
        ([GOOD, "Hello"], r"messages\[1\]='Hello' is not a message; expected role and content"),
        ([GOOD, GOOD, None], r"messages\[2\]=None is not a message"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([GOOD, {"content": "x"}], r"messages\[1\] has no role"),
        ([{}], r"messages\[0\] has no role"),
        ([GOOD | {"contents": "x"}], r"messages\[0\] has an unknown key 'contents'; did you mean"),
        ([GOOD | {3: "x"}], r"messages\[0\] has an unknown key 3$"),
        ([GOOD | {"content": None}], r"messages\[0\]\.content=None is not text; expected a text"),
        ([GOOD | {"content": ["x"]}], r"messages\[0\]\.content=\['x'\] is not text"),
        ([GOOD, GOOD | {"role": "usr"}], r"messages\[1\]\.role='usr' is unknown; .*mean 'user'\?"),
        ([GOOD | {"role": "User"}], r"messages\[0\]\.role='User' is unknown; expected one of sys"),
        ([GOOD | {"role": ["user"]}], r"messages\[0\]\.role=\['user'\] is unknown"),
        ([GOOD | {"content": "ab\ud800"}], r"messages\[0\]\.content has a .*U\+D800, at char.* 2;"),
    ],
)
def test_error_has_the_item_and_the_key(listing, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_messages(listing)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@given(listing=JSON)
@example([{"role": "user", "content": "x"}])
def test_any_json_gives_messages_or_an_error_of_one_line(listing):
    try:
        messages = parse_messages(listing)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert listing == [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize(
    ("role", "content", "message"),
    [
        ("robot", "x", r"role='robot' is unknown"),
        ("user", b"x", r"content=b'x' is not text"),
        ("user", "\udfff", r"lone surrogate, U\+DFFF, at character 0; remove it"),
    ],
)
def test_message_is_checked_when_it_is_made(role, content, message):
    with pytest.raises(UserError, match=message):
        Message(role, content)


def test_dialogue_is_split_by_role():
    first, second = Message("user", "1"), Message("user", "2")
    assert split_dialogue([first]) == (None, ["1"], [])
    assert split_dialogue([SYSTEM, first, ANSWER, second]) == ("s", ["1", "2"], ["a"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the dialogue has no message; expected a user message"),
        ([SYSTEM], "the dialogue has only a system message; expected a user message"),
        ([ANSWER], r"messages\[0\].role='assistant' is out of order"),
        ([SYSTEM, ANSWER], r"messages\[1\].role='assistant' is out of order"),
        ([SYSTEM, SYSTEM, USER], r"messages\[1\].role='system' is out of order"),
        ([USER, SYSTEM], r"messages\[1\].role='system' is out of order"),
        (
            [USER, USER],
            r"messages\[1\].role='user' is out of order; expected user and assistant alternately",
        ),
        ([USER, ANSWER, ANSWER], r"messages\[2\].role='assistant' is out of order"),
        ([USER, ANSWER], r"messages\[1\], the last, is the assistant's; expected a user message"),
        ([SYSTEM, USER, ANSWER], r"messages\[2\], the last, is the assistant's"),
    ],
)
def test_any_other_order_is_an_error(messages, message):
    with pytest.raises(UserError, match=message):
        split_dialogue(messages)
