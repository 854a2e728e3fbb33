"""Folders of examples with loss weights: damage, packing without cutting, preference pairs."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from token_folders import counting, write_documents, write_examples

from llama_jax.data.datasets import open_dataset
from llama_jax.data.loader import training_batches, validation_batches
from llama_jax.data.token_folder import TokenFolder, fingerprint, mask_path
from llama_jax.errors import UsageError, UserError


def masked(lengths, first=0):
    """Return examples whose tokens count up over all, with every third token trained."""
    return [(tokens, tokens % 3 == 0) for tokens in counting(lengths, first)]


def segments_of(dataset):
    """Return the segments of each sequence, each as (inputs, targets, weights)."""
    found = []
    for index in range(len(dataset)):
        row = dataset[index]
        places = [row.segments_T == number for number in range(1, row.segments_T.max() + 1)]
        columns = (row.inputs_T, row.targets_T, row.weights_T)
        found.append([tuple(column[place].tolist() for column in columns) for place in places])
        assert not row.weights_T[row.segments_T == 0].any()
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(1, 40))
def test_examples_are_packed_whole_with_their_weights(tmp_path_factory, lengths, shard_tokens):
    examples = masked(lengths)
    path = tmp_path_factory.mktemp("tokens")
    folder = write_examples(path, examples, shard_tokens=shard_tokens)
    found = [
        each for row in segments_of(open_dataset(folder, "train", 11, "documents")) for each in row
    ]
    expected = [
        (tokens[:-1].tolist(), tokens[1:].tolist(), weights[1:].astype(float).tolist())
        for tokens, weights in examples
    ]
    assert sorted(found) == sorted(expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=9))
def test_pairs_stay_side_by_side(tmp_path_factory, lengths):
    examples = masked([length for pair in lengths for length in pair])
    folder = write_examples(tmp_path_factory.mktemp("tokens"), examples, kind="preferences")
    rows = segments_of(open_dataset(folder, "train", 13, "documents"))
    pairs = [tuple(row[place : place + 2]) for row in rows for place in range(0, len(row), 2)]
    inputs = [tuple(inputs for inputs, _, _ in pair) for pair in pairs]
    tokens = [tokens[:-1].tolist() for tokens, _ in examples]
    assert sorted(inputs) == sorted(zip(tokens[::2], tokens[1::2]))


def test_weights_reach_the_batches(tmp_path):
    folder = write_examples(tmp_path, masked([5, 6, 7, 8]), masked([5, 4], first=100))
    options = {"batch_size": 2, "sequence_length": 8, "packing": "documents"}
    batch = next(training_batches(folder, seed=1, **options))
    expected = (batch.segments_BT > 0) & (batch.targets_BT % 3 == 0)
    assert (batch.weights_BT == expected).all() and batch.weights_BT.any()
    (batch,) = validation_batches(folder, **options)
    assert batch.weights_BT.sum() == sum(
        token % 3 == 0 for token in (101, 102, 103, 104, 107, 108, 109)
    )


def test_a_sequence_shorter_than_the_longest_example_is_an_error(tmp_path):
    folder = write_examples(tmp_path, masked([5, 9]))
    assert folder.longest == 8
    assert len(open_dataset(folder, "train", 8, "documents")) == 2
    with pytest.raises(UsageError) as caught:
        open_dataset(folder, "train", 7, "documents")
    assert str(caught.value) == (
        f"data.sequence_length=7 is shorter than the longest example of {tmp_path}; set it to at"
        " least 8, or prepare the data again with --sequence_length 7"
    )


def test_examples_are_packed_as_documents_only(tmp_path):
    folder = write_examples(tmp_path, masked([5, 9]))
    with pytest.raises(UsageError, match=r"data.packing='none' would cut the examples of .*=docu"):
        open_dataset(folder, "train", 8, "none")


def test_a_text_folder_is_written_as_before(tmp_path):
    folder = write_documents(tmp_path / "text", counting([5, 9]))
    meta = json.loads((tmp_path / "text" / "meta.json").read_text())
    assert meta["version"] == 1 and "examples" not in meta
    assert folder.masks("train") == () and folder.kind == "text"
    write_examples(tmp_path / "examples", masked([5, 9]))
    meta = json.loads((tmp_path / "examples" / "meta.json").read_text())
    assert meta["version"] == 2, "an older reader would train on every token"


def test_the_fingerprint_depends_on_the_weights(tmp_path):
    examples = masked([5, 9])
    first = write_examples(tmp_path / "a", examples)
    again = write_examples(tmp_path / "b", examples)
    other = write_examples(tmp_path / "c", [(tokens, ~weights) for tokens, weights in examples])
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "train-00000.mask.bin is missing; remove the folder"),
        (
            lambda path: path.write_bytes(b"\1" * 14),
            "mask.bin has changed since it was written; rem",
        ),
        (lambda path: path.write_bytes(b""), "mask.bin has changed since it was written; remove"),
    ],
)
def test_damaged_weights_are_an_error(tmp_path, damage, message):
    folder = write_examples(tmp_path, masked([5, 9]))
    damage(mask_path(folder.splits["train"].shards[0].path))
    with pytest.raises(UserError, match=message):
        TokenFolder.open(tmp_path, full_check_bytes=0)


@pytest.mark.parametrize("examples", [7, [], {"kind": "x"}, {"longest": 3, "other": 1}])
def test_damaged_metadata_of_examples_are_an_error(tmp_path, examples):
    write_examples(tmp_path, masked([5, 9]))
    meta = json.loads((tmp_path / "meta.json").read_text()) | {"examples": examples}
    meta["fingerprint"] = fingerprint(meta)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta.json is damaged"):
        TokenFolder.open(tmp_path)


def test_small_data_fill_less_than_a_sequence(tmp_path):
    folder = write_examples(tmp_path, masked([5]))
    dataset = open_dataset(folder, "train", 64, "documents")
    assert len(dataset) == 1 and np.count_nonzero(dataset[0].segments_T) == 4
