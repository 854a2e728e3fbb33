"""Records recognised by their keys: every kind, what is dropped, and errors in one line."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from llama_jax.data.prepare.documents import ReadProgress
from llama_jax.data.prepare.records import (
    Dialogue,
    Instruction,
    PlainCompletion,
    PlainText,
    Preference,
    Unusable,
    find_records,
    function_records,
    is_example,
    parse_example,
    read_records,
)
from llama_jax.errors import UserError
from llama_jax.text.chat import Message

U, A = Message("user", "Hi"), Message("assistant", "Hello")
USER, ASSISTANT = ({"role": each.role, "content": each.content} for each in (U, A))
OTHER = ASSISTANT | {"content": "Go away"}
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHOSEN, REJECTED = Dialogue((U, A), True), Dialogue((U, Message("assistant", "Go away")), True)
PAIR = Preference(CHOSEN, REJECTED)
KNOWN = [
    ({"messages": [USER, ASSISTANT], "id": 3}, Dialogue((U, A))),
    ({"messages": [USER, ASSISTANT, USER]}, Dialogue((U, A), was_unanswered=True)),
    ({"conversations": SHARE}, Dialogue((U, A))),
    ({"conversations": SHARE, "system": "s"}, Dialogue((Message("system", "s"), U, A))),
    ({"prompt": "Hi", "completion": " Hello"}, PlainCompletion("Hi", " Hello")),
    ({"prompt": [USER], "completion": [ASSISTANT]}, CHOSEN),
    ({"prompt": "Hi", "completion": [ASSISTANT]}, CHOSEN),
    ({"prompt": [USER], "completion": "Hello"}, CHOSEN),
    ({"instruction": "i", "input": "x", "output": "o"}, Instruction("i", "x", "o")),
    ({"instruction": "i", "input": None, "output": "o"}, Instruction("i", "", "o")),
    ({"instruction": "i", "output": "o"}, Instruction("i", "", "o")),
    ({"text": "Once."}, PlainText("Once.")),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}, PAIR),
    ({"prompt": "Hi", "chosen": [ASSISTANT], "rejected": [OTHER]}, PAIR),
    ({"prompt": [USER], "chosen": "Hello", "rejected": "Go away"}, None),
    ({"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, PAIR),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, PAIR),
    (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        Preference(PlainCompletion("2+2=", "4"), PlainCompletion("2+2=", "5")),
    ),
    (
        {"chosen": "Q: a A: the one", "rejected": "Q: a A: then two"},
        Preference(PlainCompletion("Q: a A:", " the one"), PlainCompletion("Q: a A:", " then two")),
    ),
]


@pytest.mark.parametrize(("record", "expected"), KNOWN)
def test_kinds_are_recognised_by_their_keys(record, expected):
    assert parse_example(record, "x:1") == (expected or PAIR)
    assert is_example(record) == ("text" not in record)


DROPPED = [
    ({"messages": []}, "no answer"),
    ({"messages": [USER]}, "no answer"),
    ({"messages": [USER, USER, ASSISTANT]}, "roles out of order"),
    ({"messages": [ASSISTANT]}, "roles out of order"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "an empty answer"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "a message that is not understood"),
    ({"messages": [USER, {"role": "assistant"}]}, "a message that is not understood"),
    ({"messages": [USER, {"role": [], "content": 3}]}, "a message that is not understood"),
    ({"prompt": "x", "completion": None}, "an empty answer"),
    ({"prompt": [USER], "completion": [ASSISTANT, USER]}, "a completion of several messages"),
    ({"instruction": "i", "output": ""}, "an empty answer"),
    ({"text": "\n"}, "an empty text"),
    ({"text": "\ud800"}, "a text that has a lone surrogate"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "equal answers"),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "equal answers"),
    ({"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "x"}, OTHER]}, "answers to"),
]


@pytest.mark.parametrize(("record", "reason"), DROPPED)
def test_what_cannot_be_trained_on_is_dropped(record, reason):
    with pytest.raises(Unusable) as caught:
        parse_example(record, "x:1")
    assert caught.value.reason.startswith(reason)


WRONG = [
    (7, "x:1 is 7; expected an object with the keys `messages`, `conversations`, `prompt` and"),
    ({}, "x:1 has no keys; expected `messages`,"),
    ({"question": 1, "answer": 2}, "x:1 has the keys 'question', 'answer'; expected `messages`, "),
    ({"messages": "Hi"}, "x:1: messages='Hi' is no list; expected a list of messages"),
    ({"messages": ["Hi"]}, "x:1: messages[0]='Hi' is no message; expected role and content"),
    ({"text": 3}, "x:1: text=3 is not text; expected a text"),
    ({"instruction": [], "output": "o"}, "x:1: instruction=[] is not text; expected a text"),
    ({"chosen": "x", "rejected": [USER]}, "x:1: chosen='x' is no list; expected a list of"),
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_records_of_no_known_kind_are_errors(record, message):
    with pytest.raises(UserError) as caught:
        parse_example(record, "x:1")
    assert str(caught.value).startswith(message)


KEYS = ["messages", "conversations", "prompt", "completion", "instruction", "input", "output"]
KEYS += ["text", "chosen", "rejected", "system", "role", "content", "from", "value", "other"]
TEXTS = st.sampled_from(["", " ", "user", "assistant", "gpt", "Hi there", "\ud800", "\0"])
ODD = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(ODD)
@example({"messages": [{"role": "user", "content": []}]})
@example({"chosen": [], "rejected": []})
@example({"prompt": None, "completion": None})
def test_odd_records_are_examples_or_dropped_or_errors_of_one_line(record):
    try:
        parse_example(record, "x:1")
    except Unusable as error:
        assert error.reason
    except UserError as error:
        assert "\n" not in str(error)


def read(*paths):
    return list(read_records(find_records(paths), ReadProgress()))


def test_records_are_read_from_json_and_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text(json.dumps([{"text": "three"}, {"text": "four"}]))
    (tmp_path / "notes.txt").write_text("not read")
    places, records = zip(*read(tmp_path))
    assert [record["text"] for record in records] == ["one", "two", "three", "four"]
    assert places[1] == f"{tmp_path}/a.jsonl:3" and places[3] == f"{tmp_path}/b.json: object 2"
    with pytest.raises(UserError, match=r"notes.txt has an unknown type; .* .jsonl or .parquet"):
        read(tmp_path / "notes.txt")


def test_parquet_needs_pyarrow_and_is_read_with_it(tmp_path):
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(UserError, match=r"a.parquet needs pyarrow; pip install pyarrow, or"):
            read(path)
        return
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, OTHER]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(f"{path}: row {n}", row) for n, row in enumerate(rows, start=1)]
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"a.parquet is not a Parquet file: .*; copy it"):
        read(path)


def test_a_function_yields_records(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def examples():\n  yield {'text': 'a'}\ndef other():\n  return [{'text': 'b'}]"
    )
    assert list(function_records(str(path))) == [(f"{path}:examples, example 1", {"text": "a"})]
    assert list(function_records(f"{path}:other")) == [(f"{path}:other, example 1", {"text": "b"})]


@pytest.mark.parametrize(
    ("source", "place", "message"),
    [
        ("", "none.py", "--dataset 'none.py' is no Python file; expected file.py:function"),
        ("", "mine.txt:f", "--dataset 'mine.txt:f' is no Python file; expected file.py:function"),
        ("x = 1", "mine.py", "--dataset mine.py has no function 'examples'; define it, or name"),
        ("x = 1", "mine.py:x", "--dataset mine.py has no function 'x'; define it, or name"),
        ("import nothing_such", "mine.py", "cannot be imported: ModuleNotFoundError: No module"),
        ("def f(", "mine.py:f", "--dataset mine.py cannot be imported: SyntaxError: "),
        ("def f():\n  yield 1\n  1 / 0", "mine.py:f", "mine.py:f failed after 1 examples: ZeroDiv"),
        ("def f():\n  pass", "mine.py:f", "mine.py:f failed after 0 examples: TypeError: "),
        ("def f(x):\n  yield 1", "mine.py:f", "failed after 0 examples: TypeError: f() missing 1"),
    ],
)
def test_a_function_that_fails_is_an_error_of_one_line(
    tmp_path, monkeypatch, source, place, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError) as caught:
        list(function_records(place))
    assert message in str(caught.value) and "\n" not in str(caught.value)
