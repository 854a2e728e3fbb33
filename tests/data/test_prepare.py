"""Tokenization: tokens, splits, and independence of workers and chunks."""

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from llama_jax.data.prepare.corpora import corpus_from_files, hold_out_end
from llama_jax.data.prepare.documents import Chunk, ReadState, split_documents
from llama_jax.data.prepare.tokenize import TokenOptions, encode, prepare, summary
from llama_jax.text.tokenizer import Tokenizer, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LLAMA_JAX_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
STORIES = [f"Story {n} of a small boat with {n * 7} red sails.\nThe end." for n in range(41)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    return path


def tokens_of(folder, split):
    """Return all tokens of a split."""
    return np.concatenate([*folder.arrays(split), np.zeros(0, np.uint16)]).tolist()


def test_documents_are_concatenated_each_after_bos(text, tmp_path):
    corpus = corpus_from_files(text, validation=0.1)
    folder = prepare(corpus, tmp_path / "out", TokenOptions(vocab_size=300))
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
def test_bos_and_eos_options(text, tmp_path, bos, eos):
    options = TokenOptions(vocab_size=300, bos=bos, eos=eos)
    folder = prepare(corpus_from_files(text), tmp_path / "out", options)
    tokenizer = Tokenizer(folder.tokenizer_path)
    ids = [tokenizer.encode(story, bos=bos, eos=eos) for story in STORIES]
    assert tokens_of(folder, "train") + tokens_of(folder, "validation") == list(
        itertools.chain(*ids)
    )
    assert (folder.bos, folder.eos) == (bos, eos)


def test_result_does_not_depend_on_the_number_of_workers(text, tmp_path):
    folders = [
        prepare(
            corpus_from_files(text),
            tmp_path / str(workers),
            TokenOptions(vocab_size=300, workers=workers, shard_tokens=100),
            batch_characters=200,
        )
        for workers in (1, 3)
    ]
    assert len({folder.fingerprint for folder in folders}) == 1
    assert len(folders[0].splits["train"].shards) > 5


def test_chunks_have_the_tokens_of_the_complete_document(tmp_path):
    path, text = tmp_path / "book.txt", "\n".join(STORIES)
    path.write_text(text)
    corpus = corpus_from_files(path, validation=0.0)
    whole = prepare(corpus, tmp_path / "whole", TokenOptions(vocab_size=300))
    chunked = dataclasses.replace(
        corpus, read=lambda state: corpus.read(dataclasses.replace(state, chunk_characters=90))
    )
    options = TokenOptions(tokenizer=os.fspath(whole.tokenizer_path), eos=True)
    parts = prepare(chunked, tmp_path / "parts", options)
    tokenizer = Tokenizer(whole.tokenizer_path)
    assert tokens_of(parts, "train") == tokenizer.encode(text, bos=True, eos=True)
    assert tokens_of(parts, "train")[:-1] == tokens_of(whole, "train")


@pytest.mark.parametrize("longest", [7, 30, 1000])
@pytest.mark.parametrize("kept", [1, 3, 20, 40, 60])
@pytest.mark.parametrize("text", ["a first line\nand a second one\n\nthe third line", "x" * 60])
def test_end_of_a_single_document_is_held_out(longest, kept, text):
    assigned = list(hold_out_end(split_documents([text, None], longest), kept))
    found = {"train": "", "validation": ""}
    for split, chunk in assigned:
        assert chunk.is_first == (found[split] == "")
        found[split] += chunk.text
    assert found["train"] and (found["train"] + found["validation"]).replace("\n", "") in (
        text.replace("\n", ""),
        text.replace("\n", "").replace(" ", "", 1),
        text.replace("\n", "").replace("line and", "lineand"),
    )
    assert [split for split, _ in assigned] == sorted(split for split, _ in assigned)
    ends = [chunk.is_last for split, chunk in assigned if split == "train"]
    assert ends == [False] * (len(ends) - 1) + [True]


def test_single_document_is_cut_at_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(STORIES))
    corpus = corpus_from_files(path, validation=0.2)
    assert "its last 20% is validation" in corpus.notices[0]
    texts = {split: chunk.text for split, chunk in corpus.read(ReadState())}
    assert texts["train"] + "\n" + texts["validation"] == "\n".join(STORIES)
    assert 0.15 < len(texts["validation"]) / len("\n".join(STORIES)) < 0.2


def test_notice_about_a_missing_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n***\nTwo.\n")
    assert "not split at '---'; its last" in corpus_from_files(path, split_at="---").notices[0]
    assert corpus_from_files(path, split_at="***").notices == ()


@pytest.mark.parametrize(
    ("count", "validation", "held_out"), [(2, 0.05, 1), (2, 0.99, 1), (30, 0.0, 0), (40, 0.05, 2)]
)
def test_each_split_has_a_document(tmp_path, count, validation, held_out):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES[:count]))
    corpus = corpus_from_files(path, validation=validation)
    splits = [split for split, _ in corpus.read(ReadState())]
    assert splits == ["train"] * (count - held_out) + ["validation"] * held_out


def test_notice_about_replaced_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one \xff two \xfe")
    corpus = corpus_from_files(path, errors="replace", validation=0.0)
    assert corpus.notices == ("2 invalid characters were replaced by U+FFFD",)


def test_training_sample_is_spread_evenly(text):
    corpus = corpus_from_files(text, validation=0.1)
    sample = list(corpus.training_sample(corpus.characters // 4))
    assert sample == STORIES[:37:5]
    assert list(corpus.training_sample(10**6)) == STORIES[:37]


def test_encoding_reads_only_a_few_batches_ahead(tmp_path):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "train", Chunk("a small boat with a red sail", True, True)

    tokenizer_path = tmp_path / "t.model"
    tokenizer = train_tokenizer(STORIES, 300, tokenizer_path)
    encoded = encode(endless(), tokenizer, TokenOptions(workers=2), batch_characters=100)
    for _ in range(10):
        next(encoded)
    encoded.close()
    assert taken < 80


@pytest.mark.skipif(not (DATA / "tinystories.txt").is_file(), reason="no TinyStories")
def test_tinystories_are_split_into_stories(tmp_path):
    corpus = corpus_from_files(DATA / "tinystories.txt")
    options = TokenOptions(tokenizer=os.fspath(DATA / "tok512.model"))
    folder = prepare(corpus, tmp_path / "out", options)
    assert [split.documents for split in folder.splits.values()] == [7442, 392]
    stories = (DATA / "tinystories.txt").read_text().split("<|endoftext|>")
    tokenizer = Tokenizer(DATA / "tok512.model")
    tokens, starts = folder.arrays("train")[0], folder.document_starts("train")[0]
    for index in (0, 1, 5000):
        expected = tokenizer.encode(stories[index].strip(), bos=True, eos=False)
        assert tokens[starts[index] : starts[index + 1]].tolist() == expected
