"""The command prepare.py: token folders, error messages and interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.cli import main as cli
from llama_jax.cli import prepare as prepare_command
from llama_jax.data.token_folder import TokenFolder
from llama_jax.text.sentencepiece import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DOOR = [sys.executable, str(REPOSITORY / "prepare.py")]
STORIES = [f"Story {n} of a small boat with {n * 7} red sails.\nThe end." for n in range(41)]


def prepare(folder, *words):
    """Run prepare.py in a folder."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "LLAMA_JAX_CACHE": "cache"}
    return subprocess.run(
        [*DOOR, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def place(tmp_path):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    return tmp_path


def test_text_becomes_a_token_folder(place):
    done = prepare(place, "text.txt", "--output", "data/mine", "--vocab_size=300")
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: 39 documents" in done.stdout
    assert "written to data/mine" in done.stdout
    folder = TokenFolder.open(place / "data" / "mine")
    assert [split.documents for split in folder.splits.values()] == [39, 2]
    assert sorted(path.name for path in (place / "data").iterdir()) == ["mine"]

    tokenizer = "data/mine/tokenizer.model"
    again = prepare(place, "text.txt", "--output=again", "--tokenizer", tokenizer, "--workers=1")
    assert again.returncode == 0
    assert TokenFolder.open(place / "again").fingerprint == folder.fingerprint


@pytest.mark.slow
def test_other_kinds_of_tokenizers_are_saved_by_name_and_warned_of(place):
    words = ["text.txt", "--output=mine", "--vocab_size=290", "--model_type=unigram"]
    done = prepare(place, *words, "--save_tokenizer=named.model")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    expected = "only the formats ckpt and meta can hold it"
    assert "warning: " in done.stderr and expected in done.stderr
    assert (place / "named.model").read_bytes() == (place / "mine/tokenizer.model").read_bytes()

    done = prepare(place, "text.txt", "--output=again", "--tokenizer=named.model")
    assert done.returncode == 0 and expected in done.stderr
    fingerprints = [TokenFolder.open(place / name).fingerprint for name in ("mine", "again")]
    assert fingerprints[0] == fingerprints[1]


def test_several_inputs_and_a_key(place):
    (place / "more.jsonl").write_text('{"body": "A boat with five sails.", "text": "Not read."}\n')
    words = ["text.txt", "more.jsonl", "--text_key=body", "--output=out", "--vocab_size=300"]
    done = prepare(place, *words, "--validation=0.5")
    assert (done.returncode, done.stderr) == (0, "")
    splits = TokenFolder.open(place / "out").splits.values()
    assert [split.documents for split in splits] == [21, 21]
    expected = sum(map(len, [*STORIES, "A boat with five sails."]))
    assert sum(split.characters for split in splits) == expected


def test_uneven_split_is_a_warning(place):
    (place / "few.txt").write_text("\n<|endoftext|>\n".join(STORIES[:3]))
    done = prepare(place, "few.txt", "--output=out", "--vocab_size=285")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: 3") and done.stderr.count("\n") == 1
    assert "% of the tokens are held out for validation and 5% were requested" in done.stderr


def test_embedded_corpus_needs_no_flags(place):
    done = prepare(place, "stories", "--stories=2000")
    assert (done.returncode, done.stderr) == (0, "")
    assert TokenFolder.open(place / "data" / "stories").splits["train"].documents == 2000


MISTAKES = {
    (): (2, "an input is missing; expected files, folders or a corpus, or --dataset"),
    ("text.txt",): (2, "--output is missing"),
    ("missing.txt", "--output=out"): (1, "missing.txt does not exist"),
    ("storys",): (1, "storys does not exist; did you mean 'stories'?"),
    ("empty", "--output=out"): (1, "empty holds no text files"),
    ("blank.txt", "--output=out"): (1, "blank.txt has only whitespace"),
    ("latin.txt", "--output=out"): (1, "latin.txt is not UTF-8: byte 0xe9 at position 3"),
    ("bad.jsonl", "--output=out"): (1, "bad.jsonl:2 is not JSON"),
    ("image.png", "--output=out"): (1, "image.png has an unknown type"),
    ("text.txt", "--output=out"): (1, "vocab_size=4096 is too large"),
    ("text.txt", "--output=out", "--vocab_size=9"): (1, "vocab_size=9 is too small"),
    ("text.txt", "--output=out", "--vocab_size=0"): (2, "--vocab_size 0 is out of range"),
    ("text.txt", "--output=out", "--vocab_size=x"): (2, "invalid int value"),
    ("text.txt", "--output=text.txt"): (1, "text.txt exists already"),
    ("text.txt", "--output=text.txt/out"): (1, "cannot write to text.txt/out"),
    ("text.txt", "--output=out", "--tokenizer=none.model"): (1, "none.model does not exist"),
    ("text.txt", "--output=out", "--tokenizer=text.txt"): (1, "not a SentencePiece model"),
    ("text.txt", "--output=out", "--tokenizer=a", "--vocab_size=9"): (2, "exclude each other"),
    ("text.txt", "--output=out", "--validation=1"): (2, "--validation 1.0 is out of range"),
    ("text.txt", "--output=out", "--validation=nan"): (2, "--validation nan is out of range"),
    ("text.txt", "--output=out", "--split_at="): (2, "--split_at needs one line"),
    ("text.txt", "--output=out", "--shard_tokens=0"): (2, "--shard_tokens 0 is out of range"),
    ("text.txt", "--output=out", "--workers=-1"): (2, "--workers -1 is out of range"),
    ("text.txt", "--output=out", "--errors=ignore"): (2, "invalid choice: 'ignore'"),
    ("text.txt", "--output=out", "--stories=9"): (2, "--stories applies to the corpus"),
    ("text.txt", "--output=out", "--vocabsize=9"): (2, "did you mean '--vocab_size'"),
    ("stories", "--stories=0"): (2, "--stories 0 is out of range"),
    ("stories", "--validation=0.1"): (2, "--validation does not apply to `stories`"),
    ("shakespeare", "--split_at=none"): (2, "--split_at applies to your own files"),
    ("stories", "--text_key=body"): (2, "--text_key applies to your own files"),
    ("text.txt", "stories", "--output=out"): (2, "stories is a corpus by itself"),
    ("text.txt", "missing.txt", "--output=out"): (1, "missing.txt does not exist"),
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_errors_are_one_line_and_leave_nothing(place, monkeypatch, capfd, words):
    (place / "empty").mkdir()
    (place / "blank.txt").write_text(" \n\ufeff"[:2])
    (place / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (place / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (place / "image.png").write_bytes(b"\x89PNG")
    before = sorted(place.rglob("*"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(prepare_command.main)
    stdout, stderr = capfd.readouterr()
    code, message = MISTAKES[words]
    assert end.value.code == code, stderr
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert stdout == ""
    assert sorted(place.rglob("*")) == before


def test_failed_write_is_one_line_and_leaves_nothing(place):
    (place / "large.txt").write_text("\n<|endoftext|>\n".join(STORIES * 100))
    train_tokenizer(STORIES, 300, place / "t.model")
    command = [*DOOR, "large.txt", "--output=out", "--tokenizer=t.model", "--shard_tokens=1000000"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command],  # blocks of 1024 bytes
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: cannot write to out: File too large; free some space or choose another place\n"
    )
    assert not list(place.glob("*out*"))


def test_debug_shows_the_traceback(place):
    done = prepare(place, "missing.txt", "--output=out", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_interrupted_run_leaves_nothing(place):
    train_tokenizer(STORIES, 300, place / "t.model")
    (place / "large.txt").write_text("\n<|endoftext|>\n".join(STORIES * 20_000))
    words = ["large.txt", "--output=data/large", "--tokenizer=t.model", "--workers=1"]
    process = subprocess.Popen(
        [*DOOR, *words],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while not list(place.glob("data/.large.partial-*/large/train-00000.bin")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert (process.returncode, stderr) == (130, b"")
    assert not (place / "data").exists()

    done = prepare(place, "text.txt", "--output=data/large", "--tokenizer=t.model")
    assert done.returncode == 0
    assert [path.name for path in (place / "data").iterdir()] == ["large"]
    TokenFolder.open(place / "data" / "large")
