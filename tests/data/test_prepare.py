"""Preparing: the tokens that come out, who is held out, and that nothing half-made stays."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from llama_jax import files as progress
from llama_jax.data.prepare import corpus as corpus_file
from llama_jax.data.prepare import documents
from llama_jax.data.prepare import tokenize as prepare
from llama_jax.data.prepare.corpus import corpus_from_files, hold_out_end
from llama_jax.data.prepare.documents import Passage, passages
from llama_jax.data.prepare.tokenize import TokenOptions, summary
from llama_jax.errors import UserError
from llama_jax.files import new_folder
from llama_jax.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LLAMA_JAX_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
STORIES = [f"Story {n} of a small boat with {n * 7} red sails.\nThe end." for n in range(41)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    return path


def tokens_of(folder, split):
    """All tokens of a split."""
    return np.concatenate([*folder.arrays(split), np.zeros(0, np.uint16)]).tolist()


def test_documents_follow_one_another_each_after_bos(text, tmp_path):
    corpus = corpus_from_files(text, validation=0.1)
    folder = prepare.prepare(corpus, tmp_path / "out", TokenOptions(vocab_size=300))
    tokenizer = Tokenizer(folder.tokenizer_path)
    for split, stories in (("train", STORIES[:37]), ("validation", STORIES[37:])):
        ids = [tokenizer.encode(story, bos=True, eos=False) for story in stories]
        assert tokens_of(folder, split) == list(itertools.chain(*ids))
        assert folder.splits[split].documents == len(stories)
        assert folder.splits[split].characters == sum(map(len, stories))
        starts = folder.document_starts(split)[0]
        assert (folder.arrays(split)[0][starts] == tokenizer.bos_id).all()
    assert any("train: 37 documents" in line for line in summary(folder))


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (False, True), (True, True)])
def test_bos_and_eos_are_put_where_asked(text, tmp_path, bos, eos):
    options = TokenOptions(vocab_size=300, bos=bos, eos=eos)
    folder = prepare.prepare(corpus_from_files(text), tmp_path / "out", options)
    tokenizer = Tokenizer(folder.tokenizer_path)
    ids = [tokenizer.encode(story, bos=bos, eos=eos) for story in STORIES]
    assert tokens_of(folder, "train") + tokens_of(folder, "validation") == list(
        itertools.chain(*ids)
    )
    assert (folder.bos, folder.eos) == (bos, eos)


def test_the_result_is_the_same_for_any_number_of_workers(text, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 200)
    folders = [
        prepare.prepare(
            corpus_from_files(text),
            tmp_path / str(workers),
            TokenOptions(vocab_size=300, workers=workers, shard_tokens=100),
        )
        for workers in (1, 2, 5)
    ]
    assert len({folder.fingerprint for folder in folders}) == 1
    assert len(folders[0].splits["train"].shards) > 5


def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    path, text = tmp_path / "book.txt", "\n".join(STORIES)
    path.write_text(text)
    corpus = corpus_from_files(path, validation=0.0)
    whole = prepare.prepare(corpus, tmp_path / "whole", TokenOptions(vocab_size=300))
    cut = lambda fragments: passages(fragments, longest=90)  # noqa: E731
    monkeypatch.setattr(documents, "passages", cut)
    options = TokenOptions(tokenizer=os.fspath(whole.tokenizer_path), eos=True)
    parts = prepare.prepare(corpus, tmp_path / "parts", options)
    tokenizer = Tokenizer(whole.tokenizer_path)
    assert tokens_of(parts, "train") == tokenizer.encode(text, bos=True, eos=True)
    assert tokens_of(parts, "train")[:-1] == tokens_of(whole, "train")


@pytest.mark.parametrize("longest", [7, 30, 1000])
@pytest.mark.parametrize("kept", [1, 3, 20, 40, 60])
@pytest.mark.parametrize("text", ["a first line\nand a second one\n\nthe third line", "x" * 60])
def test_the_end_of_a_single_document_is_held_out(longest, kept, text):
    assigned = list(hold_out_end(passages([text, None], longest), kept))
    found = {"train": "", "validation": ""}
    for split, passage in assigned:
        assert passage.is_first == (found[split] == "")
        found[split] += passage.text
    assert found["train"] and (found["train"] + found["validation"]).replace("\n", "") in (
        text.replace("\n", ""),
        text.replace("\n", "").replace(" ", "", 1),
        text.replace("\n", "").replace("line and", "lineand"),
    )
    assert [split for split, _ in assigned] == sorted(split for split, _ in assigned)
    ends = [passage.is_last for split, passage in assigned if split == "train"]
    assert ends == [False] * (len(ends) - 1) + [True]


def test_a_single_document_is_cut_at_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(STORIES))
    corpus = corpus_from_files(path, validation=0.2)
    assert "its last 20% is for validation" in corpus.notices[0]
    texts = {split: passage.text for split, passage in corpus.read(corpus_file.Reading())}
    assert texts["train"] + "\n" + texts["validation"] == "\n".join(STORIES)
    assert 0.15 < len(texts["validation"]) / len("\n".join(STORIES)) < 0.2


def test_a_separator_that_is_nowhere_is_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n***\nTwo.\n")
    assert "not split at '---'; its last" in corpus_from_files(path, split_at="---").notices[0]
    assert corpus_from_files(path, split_at="***").notices == ()


@pytest.mark.parametrize(
    ("count", "validation", "held_out"), [(2, 0.05, 1), (2, 0.99, 1), (30, 0.0, 0), (40, 0.05, 2)]
)
def test_each_split_gets_a_document(tmp_path, count, validation, held_out):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES[:count]))
    corpus = corpus_from_files(path, validation=validation)
    splits = [split for split, _ in corpus.read(corpus_file.Reading())]
    assert splits == ["train"] * (count - held_out) + ["validation"] * held_out


def test_replaced_text_is_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one \xff two \xfe")
    corpus = corpus_from_files(path, errors="replace", validation=0.0)
    assert corpus.notices == ("2 characters were no text and became U+FFFD",)


def test_a_sample_is_spread_over_the_training_split(text):
    corpus = corpus_from_files(text, validation=0.1)
    sample = list(corpus.training_sample(corpus.characters // 4))
    assert sample == STORIES[:37:5]
    assert list(corpus.training_sample(10**6)) == STORIES[:37]


def test_tokenizing_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 100)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "train", Passage("a small boat with a red sail", True, True)

    tokenizer_path = tmp_path / "t.model"
    tokenizer = prepare.train_tokenizer(STORIES, 300, tokenizer_path)
    encoded = prepare._Encoder(tokenizer, TokenOptions(workers=2)).encode_all(endless())
    for _ in range(10):
        next(encoded)
    encoded.close()
    assert taken < 80


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_new_folder_appears_at_the_end_and_never_over_another(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(UserError, match="out exists already"), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_abandoned_folders_are_removed_and_busy_ones_kept(tmp_path):
    abandoned = tmp_path / ".out.partial-12345678"
    abandoned.mkdir()
    (abandoned / "train-00000.bin").write_bytes(b"half")
    other = tmp_path / ".other.partial-12345678"
    other.mkdir()
    with new_folder(tmp_path / "out") as first:
        assert not abandoned.exists()
        with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
            assert first.is_dir()
            (tmp_path / "out").mkdir()
        (tmp_path / "out").rmdir()
    assert other.is_dir()
    assert (tmp_path / "out").is_dir()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write to .*/out: .*file is not a folder"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize(("seconds", "lines"), [(1e9, ""), (0, "counting: 30%\ncounting: 100%\n")])
def test_logs_get_a_line_now_and_then(capsys, monkeypatch, seconds, lines):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with progress.progress("counting", 10) as show:
        show(3)
        show(10)
    assert capsys.readouterr() == ("", lines)


def test_people_get_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.progress("counting", 2_000_000) as show:
        show(500_000)
        show(2_000_000)
    assert "counting:   0%" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "tinystories.txt").is_file(), reason="no TinyStories")
def test_tinystories_are_split_by_story(tmp_path):
    corpus = corpus_from_files(DATA / "tinystories.txt")
    options = TokenOptions(tokenizer=os.fspath(DATA / "tok512.model"))
    folder = prepare.prepare(corpus, tmp_path / "out", options)
    assert [split.documents for split in folder.splits.values()] == [7442, 392]
    stories = (DATA / "tinystories.txt").read_text().split("<|endoftext|>")
    tokenizer = Tokenizer(DATA / "tok512.model")
    tokens, starts = folder.arrays("train")[0], folder.document_starts("train")[0]
    for index in (0, 1, 5000):
        expected = tokenizer.encode(stories[index].strip(), bos=True, eos=False)
        assert tokens[starts[index] : starts[index + 1]].tolist() == expected
