"""The command prepare.py with examples to fine-tune on: kinds, flags, and error messages."""

import json
import sys

import pytest
from tiny_model import TINY
from tiny_tokenizer import library_of

from llama_jax.checkpoints.metadata import Description, write_description
from llama_jax.cli import main as cli
from llama_jax.cli import prepare as prepare_command
from llama_jax.config import ModelConfig
from llama_jax.data.token_folder import TokenFolder

CONFIG = ModelConfig(**TINY)
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(20)
]
TEMPLATE = "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data, a tokenizer and a checkpoint's description, as the current folder."""
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    texts = [{"text": f"a cat {number} thinks"} for number in range(20)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "odd.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    (tmp_path / "empty.json").write_text('[{"messages": []}]')
    (tmp_path / "bad.jsonl").write_text('{"messages": \n')
    (tmp_path / "mine.py").write_text("def f():\n  for n in '12': yield {'text': n}\n")
    library_of("smollm").save(str(tmp_path / "tokenizer.json"))
    for name, template in (("ckpt", TEMPLATE), ("plain", "none")):
        (tmp_path / name).mkdir()
        library_of("smollm").save(str(tmp_path / name / "tokenizer.json"))
        description = Description(model=CONFIG, bos=False, eos=True, chat_template=template)
        write_description(tmp_path / name, description)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(monkeypatch, *words):
    """Run prepare.py; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(prepare_command.main)
    return end.value.code


def test_dialogues_become_examples_in_the_chat_format_of_the_checkpoint(place, monkeypatch, capsys):
    words = ["chats.jsonl", "--tokenizer=ckpt", "--output=out", "--show=1"]
    assert prepare(monkeypatch, *words) == 0
    folder = TokenFolder.open(place / "out")
    assert (folder.kind, folder.chat_template, folder.bos) == ("dialogues", TEMPLATE, False)
    assert [split.documents for split in folder.splits.values()] == [19, 1]
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    first, *lines = stdout.splitlines()
    assert first.startswith("---- chats.jsonl:1: 3 of ")
    assert lines[0] == "user:0?<|endoftext|>assistant:{+0.<|endoftext|>+}"
    assert lines[-1] == "written to out"


def test_a_chat_format_may_be_chosen(place, monkeypatch):
    words = ["chats.jsonl", "--tokenizer=tokenizer.json", "--output=out", "--chat=chatml"]
    assert prepare(monkeypatch, *words) == 0
    assert TokenFolder.open(place / "out").chat_template == "chatml"


def test_texts_are_examples_on_request_only(place, monkeypatch):
    words = ["texts.json", "--tokenizer=ckpt", "--output"]
    assert prepare(monkeypatch, *words, "corpus") == 0
    corpus = TokenFolder.open(place / "corpus")
    assert (corpus.kind, corpus.bos, corpus.eos) == ("text", False, True)
    assert prepare(monkeypatch, *words, "examples", "--train_on=answers") == 0
    assert TokenFolder.open(place / "examples").kind == "dialogues"


def test_a_function_of_the_user_is_a_data_set(place, monkeypatch):
    words = ["--dataset=mine.py:f", "--tokenizer=ckpt", "--output=out", "--validation=0"]
    assert prepare(monkeypatch, *words) == 0
    assert TokenFolder.open(place / "out").splits["train"].documents == 2


def test_the_context_of_the_checkpoint_is_the_longest_example(place, monkeypatch, capsys):
    (place / "long.json").write_text(
        json.dumps([*CHATS, {"text": "a " * 3 * CONFIG.context_length}])
    )
    assert prepare(monkeypatch, "long.json", "--tokenizer=ckpt", "--output=out") == 0
    expected = (
        f"dropped 1 of 21: longer than a sequence of {CONFIG.context_length}; first long.json"
    )
    assert expected in capsys.readouterr().out


CHAT = ("chats.jsonl", "--output=out")
MISTAKES = {
    CHAT: (2, "--tokenizer is missing; name the checkpoint folder that will be tuned"),
    (*CHAT, "--tokenizer=plain"): (1, "the tokenizer names no chat format; choose one with --chat"),
    (*CHAT, "--tokenizer=ckpt", "--chat=llama3"): (1, "which has no control token <|start_header"),
    (*CHAT, "--tokenizer=ckpt", "--chat=chatlm"): (2, "--chat 'chatlm' is unknown; expected one"),
    (*CHAT, "--tokenizer=none"): (1, "tokenizer none does not exist"),
    (*CHAT, "--tokenizer=ckpt", "--sequence_length=1"): (2, "--sequence_length 1 is out of range"),
    (*CHAT, "--tokenizer=ckpt", "--show=-1"): (2, "--show -1 is out of range; expected 0 to"),
    (*CHAT, "--tokenizer=ckpt", "--train_on=user"): (2, "invalid choice: 'user'"),
    (*CHAT, "--tokenizer=ckpt", "--overlong=keep"): (2, "invalid choice: 'keep'"),
    (*CHAT, "--tokenizer=ckpt", "--split_at=x"): (
        2,
        "--split_at applies to texts, not to examples",
    ),
    (*CHAT, "--tokenizer=ckpt", "--dataset=mine.py"): (2, "leave out chats.jsonl"),
    (*CHAT, "--tokenizer=ckpt", "--sequence_length=3"): (1, "0 of the 20 examples of chats.jsonl"),
    ("odd.jsonl", "--output=out", "--tokenizer=ckpt", "--show=1"): (
        1,
        "odd.jsonl:1 has the keys 'question', 'answer'; expected `messages`, `conversations`",
    ),
    ("empty.json", "--output=out", "--tokenizer=ckpt"): (
        1,
        "expected at least 2; dropped: 1 no an",
    ),
    ("bad.jsonl", "--output=out", "--tokenizer=ckpt", "--show=1"): (1, "bad.jsonl:1 is not JSON"),
    ("texts.json", "--output=out", "--show=1"): (2, "--tokenizer is missing"),
    ("stories", "--show=1"): (
        2,
        "--show applies to examples of your own; leave it out for stories",
    ),
    ("--dataset=none.py", "--output=out", "--tokenizer=ckpt"): (1, "'none.py' is no Python file"),
    ("--dataset=mine.py:f", "--tokenizer=ckpt"): (2, "--output is missing; name a folder"),
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_errors_are_one_line_and_leave_nothing(place, monkeypatch, capfd, words):
    code = prepare(monkeypatch, *words)
    stdout, stderr = capfd.readouterr()
    assert code == MISTAKES[words][0], stderr
    assert MISTAKES[words][1] in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not (place / "out").exists()
    assert "written" not in stdout
