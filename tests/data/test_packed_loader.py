"""Batches of packed documents: order by (seed, step), and losses equal to unpacked documents."""

import dataclasses
import itertools
from functools import partial

import jax
import numpy as np
import pytest
from tiny_model import make_model
from tiny_run import make_config
from token_folders import counting, write_documents

from llama_jax.config import MeshConfig
from llama_jax.data.datasets import make_example, open_dataset
from llama_jax.data.loader import Batch, abstract_batch, training_batches, validation_batches
from llama_jax.distributed.mesh import make_mesh
from llama_jax.training.step import evaluation_step, init_state, make_execution, train_step

T, VOCAB = 16, 320
LENGTHS = [5, 1, 9, 40, 3, 17, 18, 2, 33, 7, 12, 4, 6, 29, 8, 13, 11, 3, 10, 16]
DOCUMENTS = counting(LENGTHS)  # 227 targets
HELD_OUT = counting([6, 19, 2, 11, 3, 34, 8, 1], first=1000)  # 76 targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("tokens"), DOCUMENTS, HELD_OUT)


def take(count, folder, **options):
    defaults = {"batch_size": 4, "sequence_length": T, "seed": 3, "packing": "documents"}
    batches = training_batches(folder, **(defaults | options))
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def held_out(folder, **options):
    defaults = {"batch_size": 4, "sequence_length": T, "packing": "documents"}
    return list(validation_batches(folder, **(defaults | options)))


def stacked(batches, axis=0):
    """Return the batches concatenated."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis), *batches)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def pairs(batch):
    """Return every (input, target) pair of weight 1, sorted."""
    counts = batch.weights_BT == 1
    return sorted(zip(batch.inputs_BT[counts].tolist(), batch.targets_BT[counts].tolist()))


def within(documents):
    return [(n, n + 1) for document in documents for n in document[:-1].tolist()]


def test_packed_batch_has_segments(folder):
    (batch,) = take(1, folder)
    shapes = jax.tree.map(lambda array: (array.shape, array.dtype), batch)
    assert dataclasses.astuple(shapes) == (
        ((4, T), np.int32),
        ((4, T), np.int32),
        ((4, T), np.float32),
        ((4, T), np.int32),
    )
    np.testing.assert_array_equal(batch.segments_BT > 0, batch.weights_BT == 1)
    assert (batch.segments_BT.max(axis=1) >= 1).all()
    assert batch.segments_BT.max() > 1


def test_each_epoch_has_every_target_once_in_a_new_order(folder):
    epoch = len(open_dataset(folder, "train", T, "documents"))
    assert 227 / (epoch * T) > 0.9
    taken = take(2 * epoch, folder, batch_size=1)
    first, second = stacked(taken[:epoch]), stacked(taken[epoch:])
    assert pairs(first) == pairs(second) == within(DOCUMENTS)
    assert not np.array_equal(first.inputs_BT, second.inputs_BT)


def test_batch_that_is_not_packed_has_no_segments(folder):
    assert len(open_dataset(folder, "train", T, "none")) == 11  # one a file of 17 to 23 tokens
    assert take(1, folder, packing="none")[0].segments_BT is None


def test_order_is_a_function_of_seed_and_step(folder):
    reference = take(12, folder)
    assert_equal(take(12, folder), reference)
    assert_equal(take(3, folder, start_step=9), reference[9:])
    assert not np.array_equal(take(1, folder, seed=4)[0].inputs_BT, reference[0].inputs_BT)


@pytest.mark.parametrize("count", [2])
def test_batches_do_not_depend_on_the_number_of_shards(folder, count):
    reference = take(5, folder, start_step=2)
    shards = [
        take(5, folder, start_step=2, shard_index=index, shard_count=count)
        for index in range(count)
    ]
    assert_equal([stacked(parts) for parts in zip(*shards)], reference)


def test_validation_has_every_target_once_and_is_repeatable(folder):
    batches = held_out(folder)
    assert [batch.inputs_BT.shape for batch in batches] == [(4, T)] * len(batches)
    assert pairs(stacked(batches)) == within(HELD_OUT)
    assert stacked(batches).weights_BT.sum() == 76
    assert_equal(held_out(folder), batches)
    assert_equal(held_out(folder, limit=1), batches[:1])
    shards = [held_out(folder, shard_index=index, shard_count=2) for index in range(2)]
    assert_equal([stacked(parts) for parts in zip(*shards)], batches)
    assert not batches[-1].segments_BT[-1].any()  # a sequence of padding
    assert all(batch.segments_BT is not None for batch in shards[1])


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_abstract_batch_matches_a_real_one(folder, packing):
    config = make_config("nowhere", "nowhere", data__packing=packing, data__batch_size=4)
    (batch,) = take(1, folder, packing=packing)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    assert abstract_batch(config) == shapes


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Return a token folder of documents of 2 to 30 tokens."""
    random = np.random.default_rng(0)
    lengths, firsts = random.integers(2, 31, 90), random.integers(0, VOCAB - 31, 90)
    documents = [first + np.arange(length) for first, length in zip(firsts, lengths)]
    return write_documents(tmp_path_factory.mktemp("run"), documents, documents[:7])


@pytest.fixture(scope="module")
def run(documents):
    """Return config, token folder, initial state and compiled step of a tiny run."""
    config = make_config("nowhere", "nowhere", data__packing="documents")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        step = jax.jit(
            lambda state, batch: train_step(state, batch, config, make_execution(config))
        )
        compiled = step.lower(state, abstract_batch(config)).compile()
    return config, documents, state, compiled


def train(run, state, start, stop):
    """Return the losses and batches of some steps, and the state after them."""
    config, folder, _, step = run
    options = {"batch_size": config.data.batch_size, "seed": config.data.seed}
    losses, batches = [], take(stop - start, folder, start_step=start, **options)
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return losses, batches, state


@pytest.fixture(scope="module")
def uninterrupted(run):
    """Run twenty steps without a break."""
    return train(run, run[2], 0, 20)


@pytest.mark.slow
def test_packed_run_learns_and_resumes_exactly(run, uninterrupted):
    losses, batches, _ = uninterrupted
    assert losses[-1] < losses[0] - 0.3
    before, _, state = train(run, run[2], 0, 13)
    after, resumed, _ = train(run, state, 13, 20)
    assert before + after == losses
    assert_equal(resumed, batches[13:])


def test_packed_validation_loss_equals_that_of_separate_documents(documents):
    folder, config = documents, make_config("nowhere", "nowhere", data__packing="documents")
    model = make_model(vocab_size=VOCAB, num_layers=config.model.num_layers)
    evaluate = jax.jit(
        partial(evaluation_step, config=config, execution=make_execution(config, training=False))
    )
    starts = folder.document_starts("validation")
    documents = np.split(np.concatenate(folder.arrays("validation")), starts[1:])
    pieces = [
        make_example([document[start : start + T + 1]], T)
        for document in documents
        for start in range(0, len(document) - 1, T)
    ]
    batch_size = config.data.batch_size
    packed = held_out(folder, batch_size=batch_size)
    blanks = [make_example([], T)] * (batch_size - 1)
    apart = []  # each piece in a batch of its own, without segments
    for piece in pieces:
        inputs, targets, weights, _ = (np.stack(column) for column in zip(piece, *blanks))
        apart.append(Batch(inputs_BT=inputs, targets_BT=targets, weights_BT=weights))
    sums = [
        jax.tree.map(
            lambda *values: sum(values),
            *(evaluate(model, None, batch) for batch in batches),
        )
        for batches in (packed, apart)
    ]
    tokens = sum(len(document) - 1 for document in documents)
    assert sums[0]["weights"] == sums[1]["weights"] == tokens
    assert sums[0]["loss"] == pytest.approx(float(sums[1]["loss"]), rel=1e-5)
