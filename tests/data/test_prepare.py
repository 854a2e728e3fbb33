"""Tokenization: tokens, splits, and independence of workers and chunks."""

import itertools
import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from tiny_tokenizer import library_of

from llama_jax.data.prepare.corpora import choose_held_out, corpus_from_files, hold_out_end
from llama_jax.data.prepare.documents import Chunk, ReadOptions, ReadProgress, split_documents
from llama_jax.data.prepare.tokenize import (
    TokenOptions,
    encode,
    prepare,
    split_warning,
    summary,
)
from llama_jax.errors import UserError
from llama_jax.text.sentencepiece import train_tokenizer
from llama_jax.text.tokenizer import load_tokenizer

STORIES = [f"Story {n} of a small boat with {n * 7} red sails.\nThe end." for n in range(41)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    return path


def tokens_of(folder, split):
    """Return all tokens of a split."""
    return np.concatenate([*folder.arrays(split), np.zeros(0, np.uint16)]).tolist()


def texts_of(corpus):
    """Return the documents of each split."""
    texts = {"train": [], "validation": []}
    for split, chunk in corpus.read(ReadProgress()):
        if chunk.is_first:
            texts[split].append("")
        texts[split][-1] += chunk.text
    return texts


def test_documents_are_concatenated_each_after_bos(text, tmp_path):
    corpus = corpus_from_files(text, validation=0.1)
    folder = prepare(corpus, tmp_path / "out", TokenOptions(vocab_size=300))
    tokenizer = load_tokenizer(folder.tokenizer_path)
    for split, stories in (("train", STORIES[:37]), ("validation", STORIES[37:])):
        ids = [tokenizer.encode(story, bos=True, eos=False) for story in stories]
        assert tokens_of(folder, split) == list(itertools.chain(*ids))
        assert folder.splits[split].documents == len(stories)
        assert folder.splits[split].characters == sum(map(len, stories))
        starts = folder.document_starts(split)
        assert (folder.arrays(split)[0][starts] == tokenizer.bos_id).all()
    assert any("train: 37 documents" in line for line in summary(folder))


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (False, True), (True, True)])
def test_bos_and_eos_options(text, tmp_path, bos, eos):
    options = TokenOptions(vocab_size=300, bos=bos, eos=eos)
    folder = prepare(corpus_from_files(text), tmp_path / "out", options)
    tokenizer = load_tokenizer(folder.tokenizer_path)
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
    chunked = corpus_from_files(path, validation=0.0, options=ReadOptions(chunk_characters=90))
    options = TokenOptions(tokenizer=os.fspath(whole.tokenizer_path), eos=True)
    parts = prepare(chunked, tmp_path / "parts", options)
    tokenizer = load_tokenizer(whole.tokenizer_path)
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
    (train,), (validation,) = texts_of(corpus).values()
    assert train + "\n" + validation == "\n".join(STORIES)
    assert 0.15 < len(validation) / len("\n".join(STORIES)) < 0.2


def test_notice_about_a_missing_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n***\nTwo.\n")
    corpus = corpus_from_files(path, options=ReadOptions(split_at="---"))
    assert "not split at '---'; its last" in corpus.notices[0]
    assert corpus_from_files(path, options=ReadOptions(split_at="***")).notices == ()


@pytest.mark.parametrize(
    ("count", "validation", "held_out"), [(2, 0.05, 1), (2, 0.99, 1), (30, 0.0, 0), (40, 0.05, 2)]
)
def test_last_documents_of_one_file_are_held_out(tmp_path, count, validation, held_out):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES[:count]))
    splits = [
        split for split, _ in corpus_from_files(path, validation=validation).read(ReadProgress())
    ]
    assert splits == ["train"] * (count - held_out) + ["validation"] * held_out


PLAY = "\n".join(f"Speaker {n}:\nWhat of the {n} boats, my lord?" for n in range(500))
TALES = [f"Tale {n} of a boat with a sail." for n in range(300)]


def test_every_file_is_in_both_splits(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(TALES))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    corpus = corpus_from_files(tmp_path)
    texts = texts_of(corpus)
    play, *stories = texts["validation"]
    assert texts["train"][0] + "\n" + play == PLAY
    assert 0.03 < len(play) / len(PLAY) <= 0.05
    assert [TALES.index(story) // 20 for story in stories] == list(range(15))
    assert sorted(stories + texts["train"][1:]) == sorted(TALES)
    names = f"{tmp_path}/image.png, {tmp_path}/blank.txt"
    assert corpus.notices == (
        f"skipped {names}: no text, or not .txt, .jsonl or .json",
        "documents with more than 10% of the text each: 1; their last 5% is validation",
    )
    assert texts_of(corpus_from_files(tmp_path)) == texts
    folder = prepare(corpus, tmp_path / "out", TokenOptions(vocab_size=300))
    assert split_warning(folder, 0.05) == ""
    assert "5% of the tokens are held out for validation and 40%" in split_warning(folder, 0.4)


def test_of_many_files_with_one_document_some_files_are_held_out(tmp_path):
    for index, story in enumerate(TALES[:60]):
        (tmp_path / f"{index:03}.txt").write_text(story)
    held_out = texts_of(corpus_from_files(tmp_path))["validation"]
    assert [TALES.index(story) // 20 for story in held_out] == [0, 1, 2]


@given(
    lengths=st.lists(st.integers(1, 9) | st.integers(1, 9999), min_size=1, max_size=60),
    validation=st.sampled_from([0.0, 0.001, 0.05, 0.3, 0.9]),
    is_one_file=st.booleans(),
)
def test_chosen_documents(lengths, validation, is_one_file):
    held_out, kept = choose_held_out(np.array(lengths), validation, is_one_file)
    for index, characters in kept.items():
        assert not held_out[index]
        assert 0 <= characters <= lengths[index]
        assert len(lengths) == 1 or lengths[index] > 2 * validation * sum(lengths)
    others = len(lengths) - len(kept)
    if validation == 0:
        assert not kept and not held_out.any()
    else:
        assert kept or 0 < held_out.sum() < len(lengths)
        assert abs(held_out.sum() - others * validation) <= (0.5 if kept else 1)


def test_text_added_while_it_is_read_is_an_error(text):
    corpus = corpus_from_files(text)
    with text.open("a") as stream:
        stream.write("\n<|endoftext|>\nMore.")
    with pytest.raises(UserError, match="text was added to the files while they were read"):
        texts_of(corpus)


def test_notice_about_replaced_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one \xff two \xfe")
    corpus = corpus_from_files(path, options=ReadOptions(errors="replace"), validation=0.0)
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


def test_tinystories_are_split_into_stories(shared_data, tmp_path):
    corpus = corpus_from_files(shared_data / "tinystories.txt")
    options = TokenOptions(tokenizer=os.fspath(shared_data / "tok512.model"))
    folder = prepare(corpus, tmp_path / "out", options)
    assert [split.documents for split in folder.splits.values()] == [7442, 392]
    stories = (shared_data / "tinystories.txt").read_text().split("<|endoftext|>")
    tokenizer = load_tokenizer(shared_data / "tok512.model")
    tokens, starts = folder.arrays("train")[0], folder.document_starts("train")
    for index in (0, 1, 5000):
        expected = tokenizer.encode(stories[index].strip(), bos=True, eos=False)
        assert tokens[starts[index] : starts[index + 1]].tolist() == expected


def test_a_tokenizer_json_is_copied_and_its_tokens_are_the_same_in_threads(text, tmp_path):
    library = library_of("gpt-2")
    path = tmp_path / "own.json"
    path.write_text(library.to_str())
    found = []
    for workers in (1, 3):
        options = TokenOptions(tokenizer=str(path), bos=False, eos=True, workers=workers)
        corpus = corpus_from_files(text, validation=0.1)
        folder = prepare(corpus, tmp_path / f"out{workers}", options, batch_characters=200)
        assert folder.tokenizer_path.name == "tokenizer.json"
        assert folder.tokenizer_path.read_bytes() == path.read_bytes()
        found.append(tokens_of(folder, "train"))
    expected = [[*library.encode(story).ids, 0] for story in STORIES[:37]]
    assert found[0] == found[1] == list(itertools.chain(*expected))
    with pytest.raises(UserError, match=r"own.json has no BOS token; use --no-bos --eos"):
        prepare(corpus, tmp_path / "out", TokenOptions(tokenizer=str(path)))
    assert not (tmp_path / "out").exists()
