"""Examples: layout of tokens, weights and segments, windows, and packed documents."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_folders import counting, write_documents

from llama_jax.data.datasets import PackedDataset, WindowDataset, make_example, open_dataset
from llama_jax.data.prepare.corpora import corpus_from_files
from llama_jax.data.prepare.tokenize import TokenOptions, prepare
from llama_jax.data.token_folder import TokenFolder, TokenWriter, starts_path
from llama_jax.errors import UsageError, UserError


def pairs(examples):
    """Return every (input, target) pair of weight 1."""
    return [
        pair
        for example in examples
        for *pair, weight in zip(
            example.inputs_T.tolist(), example.targets_T.tolist(), example.weights_T
        )
        if weight
    ]


def all_examples(dataset):
    return [dataset[index] for index in range(len(dataset))]


def test_example_of_several_pieces():
    sequence = make_example([np.array([5, 6, 7, 8], np.uint16), np.array([3, 9])], 6)
    assert sequence.inputs_T.tolist() == [5, 6, 7, 3, 0, 0]
    assert sequence.targets_T.tolist() == [6, 7, 8, 9, 0, 0]
    assert sequence.weights_T.tolist() == [1, 1, 1, 1, 0, 0]
    assert sequence.segments_T.tolist() == [1, 1, 1, 2, 0, 0]
    assert [array.dtype for array in sequence] == [np.int32, np.int32, np.float32, np.int32]


def test_example_with_loss_weights():
    tokens, weights = [np.array([5, 6, 7, 8]), np.array([3, 9])], [[9, 0, 0.5, 1], [9, 2]]
    sequence = make_example(tokens, 5, weights)
    assert sequence.weights_T.tolist() == [0, 0.5, 1, 2, 0]
    assert sequence.segments_T.tolist() == [1, 1, 1, 2, 0]


def test_windows_do_not_cross_files():
    arrays = (np.arange(10), np.arange(100, 103), np.arange(200, 201), np.arange(0))
    sequences = all_examples(WindowDataset(arrays, 4, keep_partial=True))
    inputs = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0], [100, 101, 0, 0]]
    assert [sequence.inputs_T.tolist() for sequence in sequences] == inputs
    assert [sequence.weights_T.sum() for sequence in sequences] == [4, 4, 1, 2]
    assert pairs(sequences) == [[n, n + 1] for n in (*range(9), 100, 101)]
    assert len(WindowDataset(arrays, 4, keep_partial=False)) == 2
    assert len(WindowDataset((), 4, keep_partial=True)) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 9), st.integers(1, 40))
def test_documents_continue_across_files(tmp_path_factory, lengths, capacity, shard_tokens):
    documents = counting(lengths)
    path = tmp_path_factory.mktemp("tokens")
    folder = write_documents(path, documents, shard_tokens=shard_tokens)
    sequences = all_examples(PackedDataset(folder, "train", capacity))
    expected = [[n, n + 1] for document in documents for n in document[:-1].tolist()]
    assert sorted(pairs(sequences)) == expected
    number_of = {token: number for number, tokens in enumerate(documents) for token in tokens}
    for sequence in sequences:
        filled = sequence.segments_T > 0
        assert (sequence.weights_T == filled).all()
        runs = np.flatnonzero(np.diff(sequence.segments_T[filled], prepend=0))
        assert sequence.segments_T[filled][runs].tolist() == [*range(1, len(runs) + 1)]
        owners = [number_of[token] for token in sequence.inputs_T[filled].tolist()]
        assert (np.diff(owners) != 0).tolist() == (
            np.diff(sequence.segments_T[filled]) != 0
        ).tolist()


@pytest.mark.parametrize(
    ("bos", "eos", "lasts"),
    [(True, False, [10, 20, 22]), (True, True, [3, 15, 22]), (False, True, [3, 15, 22])],
)
def test_next_bos_is_the_last_target_without_eos(tmp_path, bos, eos, lasts):
    documents = [np.arange(4), np.arange(10, 16), np.arange(20, 23)]
    folder = write_documents(tmp_path, documents, shard_tokens=10, bos=bos, eos=eos)
    (sequence,) = all_examples(PackedDataset(folder, "train", 14))
    ends = np.flatnonzero(np.diff(sequence.segments_T, append=0) * (sequence.segments_T > 0))
    assert sequence.targets_T[ends].tolist() == lasts
    assert sequence.inputs_T[0] == 0
    assert (
        sequence.weights_T.sum()
        == len(set(sequence.targets_T[sequence.weights_T > 0]))
        == 10 + 2 * (not eos)
    )


def test_document_starts_are_counted_over_all_files(tmp_path):
    folder = write_documents(tmp_path, counting([9, 30, 2, 5]), counting([8]), shard_tokens=12)
    assert folder.document_starts("train").tolist() == [0, 9, 39, 41]
    assert folder.document_starts("validation").tolist() == [0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY and then nothing"),
        lambda path: np.save(path, np.zeros(0, np.uint64)),
        lambda path: np.save(path, np.array([0, 9, 9], np.uint64)),
        lambda path: np.save(path, np.array([0, 9, 23], np.uint64)),
        lambda path: np.save(path, np.array([0, 9, 2**64 - 1], np.uint64)),
        lambda path: np.save(path, np.array([0, 9, 14], np.int32)),
        lambda path: np.save(path, np.array([[0, 9, 14]], np.uint64)),
        lambda path: np.save(path, np.array([0, 9, None]), allow_pickle=True),
    ],
)
def test_damaged_document_starts_without_a_hash_are_refused(tmp_path, damage):
    write_documents(tmp_path, counting([9, 5, 12, 7]))
    meta = (tmp_path / "meta.json").read_text()
    (tmp_path / "meta.json").write_text(re.sub(r',\s*"documents_sha256": "\w+"', "", meta))
    folder = TokenFolder.open(tmp_path)
    path = starts_path(folder.splits["train"].shards[0].path)
    assert np.load(path).tolist() == [0, 9, 14]
    damage(path)
    with pytest.raises(UserError, match=re.escape(f"{path} has changed since it was")):
        folder.document_starts("train")


def test_packing_needs_document_starts(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"any bytes")
    writer = TokenWriter(tmp_path, vocab_size=97, shard_tokens=40)
    writer.add("train", np.arange(60), np.zeros(0, int), characters=60)
    writer.finish(bos=False, eos=False, source="a stream")
    folder = TokenFolder.open(tmp_path)
    message = r"the train split of .* does not say where its documents start.*packing=none$"
    with pytest.raises(UserError, match=message):
        open_dataset(folder, "train", 7, "documents")
    assert len(open_dataset(folder, "train", 7, "none")) == 7


def test_too_few_tokens_to_pack_are_refused(tmp_path):
    folder = write_documents(tmp_path / "a", counting([4, 1, 5]), counting([1, 1]))
    assert len(open_dataset(folder, "train", 7, "documents")) == 1
    message = (
        r"train split of .* has only 7 tokens to predict within documents; .* at least 8: prepare"
    )
    with pytest.raises(UserError, match=message):
        open_dataset(folder, "train", 8, "documents")
    with pytest.raises(
        UserError, match=r"validation split of .* has only 0 tokens .* at least 1: "
    ):
        open_dataset(folder, "validation", 7, "documents")
    empty = write_documents(tmp_path / "b", [])
    with pytest.raises(UserError, match=r"train split of .* has only 0 tokens .* at least 7: "):
        open_dataset(empty, "train", 7, "documents")


@pytest.mark.parametrize("length", [0, -3])
def test_sequence_length_below_one_is_refused(tmp_path, length):
    folder = write_documents(tmp_path, counting([9]))
    with pytest.raises(UsageError, match=rf"data.sequence_length={length} is out of range; .* 1$"):
        open_dataset(folder, "train", length, "documents")


def test_unknown_packing_is_refused(tmp_path):
    folder = write_documents(tmp_path, counting([9]))
    with pytest.raises(
        UsageError, match=r"packing='sequences' is unknown; .* 'none', 'documents'$"
    ):
        open_dataset(folder, "train", 4, "sequences")


def test_huge_sequence_length_is_refused_before_allocation(tmp_path):
    folder = write_documents(tmp_path, counting([9, 4]))
    with pytest.raises(UserError, match=r"at least 4,611,686,018,427,387,904: .*shorten"):
        open_dataset(folder, "train", 2**62, "documents")


def test_datasets_are_cached(tmp_path):
    folder = write_documents(tmp_path, counting([9, 4]))
    assert open_dataset(folder, "train", 4, "documents") is open_dataset(
        folder, "train", 4, "documents"
    )
    assert open_dataset(folder, "train", 4, "none") is not open_dataset(
        folder, "train", 4, "documents"
    )


def test_packing_real_stories(shared_data, tmp_path):
    text, tokenizer = shared_data / "tinystories.txt", shared_data / "tok512.model"
    if not (text.is_file() and tokenizer.is_file()):
        pytest.skip("no stories or no tokenizer among the test data")
    (tmp_path / "stories.txt").write_bytes(text.read_bytes()[:1_000_000])
    corpus = corpus_from_files(tmp_path / "stories.txt", validation=0.05)
    folder = prepare(corpus, tmp_path / "tokens", TokenOptions(tokenizer=str(tokenizer)))
    for split, least in (("train", 0.97), ("validation", 0.9)):
        packed = open_dataset(folder, split, 2048, "documents")
        sequences, tokens = all_examples(packed), np.concatenate(folder.arrays(split))
        assert packed.packing.positions == len(tokens) - 1  # the BOS that follow are targets
        assert packed.efficiency > least
        targets = np.concatenate(
            [sequence.targets_T[sequence.weights_T > 0] for sequence in sequences]
        )
        np.testing.assert_array_equal(np.bincount(targets), np.bincount(tokens[1:]))
        for sequence in sequences:  # a piece begins with BOS, and no BOS is read within one
            begins = np.diff(sequence.segments_T, prepend=0) > 0
            assert (sequence.inputs_T[begins] == 1).mean() > 0.5
            assert not (sequence.inputs_T[(sequence.segments_T > 0) & ~begins] == 1).any()
