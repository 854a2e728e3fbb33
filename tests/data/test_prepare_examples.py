"""Examples from records to a token folder: weights, what is dropped, splits, what is shown."""

import numpy as np
import pytest
from tiny_tokenizer import library_of

from llama_jax.data.datasets import open_dataset
from llama_jax.data.prepare.examples import Display, ExampleOptions, prepare_examples, summary
from llama_jax.errors import UserError
from llama_jax.text.chat import Message
from llama_jax.text.chat_formats import TEMPLATES, AlpacaFormat
from llama_jax.text.tokenizer import load_tokenizer

CHATML = TEMPLATES["chatml"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library_of("smollm").save(str(path))
    return load_tokenizer(path)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """Prepare some records; return the folder and the report."""

    def prepared(records, show=None, count=0, is_terminal=False, **options):
        display = Display(write=show, count=count, is_terminal=is_terminal) if show else None
        located = [(f"x:{number}", record) for number, record in enumerate(records, start=1)]
        return prepare_examples(
            located,
            tmp_path / "out",
            tokenizer,
            ExampleOptions(**{"template": CHATML, "validation": 0, "bos": False} | options),
            source="examples of x",
            display=display,
        )

    return prepared


def dialogue(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def examples_of(folder, split="train"):
    """Return (ids, weights) of each document."""
    starts = folder.document_starts(split)[1:]
    columns = (np.concatenate(folder.arrays(split)), np.concatenate(folder.masks(split)))
    ids, weights = ([part.tolist() for part in np.split(column, starts)] for column in columns)
    return list(zip(ids, weights))


def test_dialogues_are_those_of_the_chat_format(prepare, tokenizer):
    folder, report = prepare([dialogue("Hi", "Ho"), dialogue("a", "b", "c", "d")])
    messages = [Message("user", "a"), Message("assistant", "b")]
    messages += [Message("user", "c"), Message("assistant", "d")]
    expected = CHATML.encode_example(messages, tokenizer)
    assert examples_of(folder)[1] == expected
    assert (folder.kind, folder.chat_template) == ("dialogues", "chatml")
    assert folder.longest == len(expected.ids) - 1
    assert (report.read, report.kept, dict(report.dropped)) == (2, 2, {})


@pytest.mark.parametrize(("train_on", "answers"), [("answers", "bd"), ("last", "d"), ("all", None)])
def test_what_is_trained_is_an_option(prepare, tokenizer, train_on, answers):
    folder, _ = prepare([dialogue("a", "b", "c", "d")], train_on=train_on)
    [(ids, weights)] = examples_of(folder)
    trained = tokenizer.decode([token for token, weight in zip(ids, weights) if weight])
    assert trained == answers or (answers is None and all(weights))


def test_completions_and_texts_end_with_eos(prepare, tokenizer):
    folder, _ = prepare(
        [{"prompt": "It's", "completion": " a cat"}, {"text": "Once"}], template=None
    )
    prompt, answer, end = tokenizer.encode("It's"), tokenizer.encode(" a cat"), [tokenizer.eos_id]
    first = ([*prompt, *answer, *end], [0] * len(prompt) + [1] * (len(answer) + 1))
    text = [*tokenizer.encode("Once"), *end]
    assert examples_of(folder) == [first, (text, [1] * len(text))]
    assert folder.chat_template == ""


def test_instructions_have_alpacas_format_unless_another_is_chosen(prepare, tokenizer, tmp_path):
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    folder, _ = prepare([record])
    roles = [("system", "Add."), ("user", "1 2"), ("assistant", "3")]
    messages = [Message(*each) for each in roles]
    assert examples_of(folder) == [AlpacaFormat().encode_example(messages, tokenizer)]
    assert folder.chat_template == "alpaca"
    (tmp_path / "out").rename(tmp_path / "first")
    folder, _ = prepare([record], template_for_instructions=True)
    messages = [Message("user", "Add.\n\n1 2"), messages[-1]]
    assert examples_of(folder) == [CHATML.encode_example(messages, tokenizer)]


def test_a_prompt_with_an_answer_is_not_trained_on(prepare, tokenizer):
    messages = dialogue("a", "b", "c")["messages"]
    folder, _ = prepare(
        [{"prompt": messages, "completion": [{"role": "assistant", "content": "d"}]}]
    )
    [(ids, weights)] = examples_of(folder)
    assert tokenizer.decode([token for token, weight in zip(ids, weights) if weight]) == "d"


def test_pairs_are_chosen_and_rejected_in_turn(prepare, tokenizer):
    prompt, answers = dialogue("a", "b", "c")["messages"], ("yes", "no")
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
    records = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    folder, report = prepare(records, train_on="all")
    texts = [
        tokenizer.decode([token for token, weight in zip(ids, weights) if weight])
        for ids, weights in examples_of(folder)
    ]
    assert tuple(texts) == answers, "the completions, whatever train_on says"
    assert folder.kind == "preferences"
    assert folder.longest == sum(len(ids) - 1 for ids, _ in examples_of(folder))
    row = open_dataset(folder, "train", folder.longest, "documents")[0]
    assert row.segments_T.tolist() == sorted(row.segments_T) and row.segments_T.max() == 2
    assert summary(folder, report)[0].startswith("train: 1 pairs, ")


def test_duplicates_and_unusable_examples_are_counted(prepare):
    records = [dialogue("a", "b"), dialogue("a", ""), dialogue("a", "b"), dialogue("a", " ")]
    folder, report = prepare([*records, dialogue("x", "y", "z")])
    assert (report.read, report.kept) == (5, 2)
    lines = summary(folder, report)
    assert lines[:3] == [
        "dropped 2 of 5: an empty answer; first x:2",
        "dropped 1 of 5: a duplicate; first x:3",
        "last questions without an answer, which were left out: 1",
    ]
    assert lines[3].startswith("train: 2 examples, ") and lines[3].endswith("% of them trained")


def test_a_message_with_a_tag_of_the_format_is_dropped(prepare):
    records = [{"instruction": "### Input: x", "output": "y"}, {"instruction": "x", "output": "y"}]
    _, report = prepare(records)
    assert list(report.dropped) == ["refused by the chat format alpaca"]
    assert (
        "messages[0].content has '### Input:'" in report.first_dropped[next(iter(report.dropped))]
    )


def test_examples_longer_than_a_sequence_are_dropped(prepare):
    folder, report = prepare([dialogue("a", "b"), dialogue("a", "b" * 99)], sequence_length=60)
    assert report.dropped == {"longer than a sequence of 60": 1}
    assert folder.longest <= 60
    assert "positions" in report.first_dropped["longer than a sequence of 60"]


def test_texts_are_cut_and_dialogues_are_not(prepare, tokenizer):
    shown = []
    records = [
        {"prompt": "I", "completion": " think so"},
        dialogue("a", "b" * 99),
        {"text": "a" * 99},
    ]
    records += [{"prompt": "a" * 99, "completion": "b"}]
    folder, report = prepare(records, show=shown.append, sequence_length=8, overlong="cut")
    assert report.changed == {"examples cut from the right": 2}
    assert report.dropped == {"longer than a sequence of 8": 1, "no token to train on": 1}
    [(_, first), (ids, weights)] = examples_of(folder)
    assert len(first) == 9 and len(ids) == 9 and all(weights)
    assert [line.split(",")[0] for line in shown if line.startswith("cut ")] == [
        f"cut x:1: {len(tokenizer.encode('I think so')) - 8:,} of "
        f"{len(tokenizer.encode('I think so')) + 1:,} tokens",
        f"cut x:3: {91:,} of {100:,} tokens",
    ]


def test_examples_are_held_out_at_random_and_always_the_same(prepare, tmp_path):
    records = [{"text": f"story {number}"} for number in range(40)]
    folder, _ = prepare(records, validation=0.1)
    held_out = examples_of(folder, "validation")
    assert len(held_out) == 4 and folder.splits["train"].documents == 36
    (tmp_path / "out").rename(tmp_path / "first")
    again, _ = prepare(records, validation=0.1)
    assert again.fingerprint == folder.fingerprint
    assert held_out != examples_of(folder)[-4:]


@pytest.mark.parametrize(
    ("is_terminal", "marked"),
    [(False, "{+Ho<|im_end|>+}\n"), (True, "\x1b[32mHo<|im_end|>\x1b[0m\n")],
)
def test_examples_are_shown_with_trained_tokens_marked(prepare, is_terminal, marked):
    shown = []
    records = [
        dialogue("H\x1b[2Ji", "Ho"),
        dialogue("a", ""),
        dialogue("a", "b", "c"),
        dialogue("c", "d"),
    ]
    prepare(records, show=shown.append, count=1, is_terminal=is_terminal)
    assert len(shown) == 3
    assert shown[0].startswith("---- x:1: 3 of ")
    assert "<|im_start|>user\nH\\x1b[2Ji<|im_end|>\n<|im_start|>assistant\n" + marked in shown[0]
    assert shown[1:] == ["dropped x:2: an empty answer", "cut x:3: its last question has no answer"]


def test_nothing_left_is_an_error(prepare, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare([dialogue("a", ""), dialogue("b")])
    assert str(caught.value) == (
        "0 of the 2 examples of x can be trained on; expected at least 1; dropped: 1 an empty"
        " answer, 1 no answer"
    )
    with pytest.raises(UserError, match=r"^1 of the 1 examples of x .* at least 2$"):
        prepare([dialogue("a", "b")], validation=0.1)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(prepare):
    with pytest.raises(UserError, match="x:1 has the keys 'q', 'a'; expected `messages`"):
        prepare([{"q": "x", "a": "y"}])
    with pytest.raises(UserError, match="have dialogues, but the tokenizer names no chat format; "):
        prepare([dialogue("a", "b")], template=None)
    with pytest.raises(
        UserError, match=r"the llama3 format cannot be trained with .*tokenizer.json"
    ):
        prepare([dialogue("a", "b")], template=TEMPLATES["llama3"])
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match="x:2 and the examples before it are of different kinds, p"):
        prepare([dialogue("a", "b"), pair])
