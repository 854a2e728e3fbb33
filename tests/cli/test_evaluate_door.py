"""The command evaluate.py: what it prints, and one-line errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_weights import tiny_weights

from llama_jax import evaluation
from llama_jax.cli import evaluate as evaluate_command
from llama_jax.cli import main as cli
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.llm import LLM

REPOSITORY = Path(__file__).resolve().parents[2]
ITEM = {"context": "a b", "choices": ["ab", "c"], "answer": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint in ckpt/, texts and a task."""
    folder = tmp_path_factory.mktemp("place")
    checkpoint_folder.write(tiny_weights(), folder / "ckpt")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("abc abc\n<|endoftext|>\ncab\n")
    (folder / "texts" / "b.jsonl").write_text('{"text": "bab"}\n')
    (folder / "notes").write_text("a cab")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"ab\xe9c")
    (folder / "mine.jsonl").write_text(json.dumps(ITEM) + "\n")
    (folder / "none.jsonl").write_text("\n")
    (folder / "bad.jsonl").write_text(json.dumps(ITEM | {"answer": 2}) + "\n")
    return folder


@pytest.fixture
def evaluate(place, monkeypatch, capsys, tmp_path):
    """Run the command in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)  # no cache for other tests
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "llama_jax.evaluation.harness", raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        with pytest.raises(SystemExit) as end:
            cli.run(evaluate_command.main)
        return end.value.code, *capsys.readouterr()

    return run


def test_texts_are_lines_with_their_total(evaluate):
    code, stdout, stderr = evaluate("--text=texts", "--text=notes")
    assert (code, stderr) == (0, "")
    head, *lines = (re.split(r"\s+", line.strip()) for line in stdout.splitlines())
    assert head == ["perplexity", "bits/byte", "loss", "tokens", "bytes", "documents", "text"]
    assert [line[-1] for line in lines] == ["texts/a.txt", "texts/b.jsonl", "notes", "total"]
    assert [line[4:6] for line in lines] == [["10", "2"], ["3", "1"], ["5", "1"], ["18", "4"]]


def test_json_has_all_figures(evaluate, place):
    _, stdout, _ = evaluate("--text=notes", "--json", "--stride=5", "--batch_size=2")
    found, score = json.loads(stdout), LLM(place / "ckpt").score("a cab")
    assert found.pop("bits_per_byte") == pytest.approx(-score.total / 5 / 0.6931472)
    assert found == {
        "text": "notes",
        "documents": 1,
        "tokens": len(score.logprobs),
        "bytes": 5,
        "loss": pytest.approx(-score.total / len(score.logprobs)),
        "perplexity": pytest.approx(score.perplexity),
        "logprob": pytest.approx(score.total),
    }


def test_tasks_of_the_package_and_of_a_file_are_run(evaluate):
    code, stdout, stderr = evaluate("--tasks=basics,mine.jsonl", "--limit=3")
    assert (code, stderr) == (0, "")
    rows = [line.split() for line in stdout.splitlines()]
    assert rows[0] == ["task", "metric", "value", "stderr"]
    names = [[name, metric] for name in ("basics", "mine.jsonl") for metric in ("acc", "acc_norm")]
    assert [row[:2] for row in rows[1:] if row[1] != "chance"] == names
    assert rows[3] == ["basics", "chance", "0.2500"]
    _, stdout, _ = evaluate("--tasks=mine.jsonl", "--json")
    found = json.loads(stdout)
    assert (found["task"], found["items"], found["chance"]) == ("mine.jsonl", 1, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to evaluate; add --text FILE or --tasks basics"),
        ("--text=notes --tasks=basics", "--text and --tasks exclude each other; choose one"),
        ("--text=notes --limit=3", "--text does not use --limit; leave it out"),
        ("--tasks=basics --stride=3", "--tasks does not use --stride; leave it out"),
        (
            "--tasks=basics --num_fewshot=0",
            "--num_fewshot is for tasks of lm-evaluation-harness; l",
        ),
        ("--tasks=,", "--tasks=, names no task; expected one such as basics"),
        ("--tasks=basics --limit=0", "limit=0 is out of range; expected 1 or more"),
        ("--text=notes --batch_size=0", "batch_size=0 is out of range; expected 1 or more"),
        ("--text=notes --stride=32", "stride=32 is out of range; expected 1 to 31, less than the"),
        ("--text=nowhere.txt", "--text=nowhere.txt does not exist; expected a text file"),
        ("--text=empty.txt", "empty.txt has no text to score; expected two tokens or more"),
        (
            "--text=latin.txt",
            "latin.txt is not UTF-8: byte 0xe9 at position 2; convert it, or pass",
        ),
        ("--tasks=none.jsonl", "none.jsonl has no items; expected one {"),
        ("--tasks=bad.jsonl", "bad.jsonl:1: answer=2 is out of range; expected 0 to 1, the index"),
        ("--tasks=absent.json", "absent.json does not exist; expected a task file"),
        ("--tasks=basic", "task 'basic' is unknown; expected basics, a .jsonl file or"),
        ("--text=notes --base=ckpt", "ckpt is no adapter; leave out the base"),
    ],
)
def test_mistakes_are_one_line(words, message, evaluate):
    code, _, stderr = evaluate(*words.split())
    assert code in (1, 2)
    assert stderr.startswith(f"error: {message}") and stderr.count("\n") == 1


def test_what_is_not_utf8_can_be_replaced(evaluate):
    assert evaluate("--text=latin.txt", "--errors=replace")[0] == 0


def test_the_script_runs_the_command():
    command = [sys.executable, str(REPOSITORY / "evaluate.py"), "--tasks", "basic", "--stirde=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == "error: '--stirde=3' is not understood; did you mean '--stride'?\n"
