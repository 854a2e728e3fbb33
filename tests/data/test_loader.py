"""Host batches: each token is a target once per epoch, in an order set by (seed, step) only."""

import itertools
import threading

import jax
import numpy as np
import pytest

from llama_jax.data.loader import Batch, training_batches, validation_batches
from llama_jax.data.token_folder import TokenFolder, TokenWriter
from llama_jax.errors import UsageError, UserError

T = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tokens"), train=230, validation=61)


def make_folder(path, train, validation):
    """Write a folder whose tokens count up, in shards of 100."""
    (path / "tokenizer.model").write_bytes(b"any bytes")
    writer = TokenWriter(path, vocab_size=1009, shard_tokens=100)
    for split, count in (("train", train), ("validation", validation)):
        writer.add(split, np.arange(count), np.arange(min(1, count)), characters=count)
    writer.finish(bos=True, eos=False, source="a test")
    return TokenFolder.open(path)


def take(count, folder, **options):
    """Return the first training batches."""
    defaults = {"batch_size": 6, "sequence_length": T, "seed": 3}
    batches = training_batches(folder, **(defaults | options))
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def inputs(batches):
    return np.stack([batch.inputs_BT for batch in batches])


def test_batch_holds_inputs_targets_and_weights(folder):
    (batch,) = take(1, folder)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == batch.weights_BT.shape == (6, T)
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == np.int32
    assert batch.weights_BT.dtype == np.float32
    np.testing.assert_array_equal(batch.targets_BT, batch.inputs_BT + 1)
    assert (batch.weights_BT == 1).all()
    assert len(jax.tree.leaves(batch)) == 3
    assert isinstance(jax.tree.map(lambda x: x + 1, batch), Batch)


def test_each_epoch_has_every_window_once_in_a_new_order(folder):
    windows = [*range(0, 98, T), *range(100, 198, T), *range(200, 228, T)]  # 14 + 14 + 4
    firsts = inputs(take(16, folder, batch_size=4))[:, :, 0]
    first_epoch, second_epoch = firsts[:8].ravel(), firsts[8:].ravel()
    assert sorted(first_epoch) == sorted(second_epoch) == windows
    assert list(first_epoch) != windows
    assert list(first_epoch) != list(second_epoch)


def test_order_is_a_function_of_seed_and_step(folder):
    reference = inputs(take(12, folder))
    np.testing.assert_array_equal(inputs(take(12, folder)), reference)
    np.testing.assert_array_equal(inputs(take(3, folder, start_step=9)), reference[9:])
    assert not np.array_equal(inputs(take(12, folder, seed=4)), reference)


@pytest.mark.parametrize("count", [2, 3])
def test_batches_do_not_depend_on_the_number_of_shards(folder, count):
    reference = inputs(take(5, folder, start_step=2))
    shards = [
        inputs(take(5, folder, start_step=2, shard_index=index, shard_count=count))
        for index in range(count)
    ]
    np.testing.assert_array_equal(np.concatenate(shards, axis=1), reference)


def test_starting_at_a_far_step_is_instant(folder):
    assert len(take(1, folder, start_step=10**12)) == 1


def test_close_stops_the_reading_threads(folder):
    before = set(threading.enumerate())
    batches = training_batches(folder, batch_size=2, sequence_length=T, seed=0)
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_batch_may_be_larger_than_the_epoch(tmp_path):
    folder = make_folder(tmp_path, train=T + 1, validation=0)
    np.testing.assert_array_equal(
        inputs(take(2, folder, batch_size=3)), np.broadcast_to(np.arange(T), (2, 3, T))
    )


def validation(folder, **options):
    return list(validation_batches(folder, **({"batch_size": 4, "sequence_length": T} | options)))


def test_validation_has_every_target_once_in_order(folder):
    batches = validation(folder)
    assert [batch.inputs_BT.shape for batch in batches] == [(4, T)] * 3
    weights = np.concatenate([batch.weights_BT for batch in batches])
    targets = np.concatenate([batch.targets_BT for batch in batches])
    assert targets[weights == 1].tolist() == list(range(1, 61))
    assert set(np.unique(weights)) == {0, 1}
    assert weights.sum(axis=1).tolist() == [T] * 8 + [4, 0, 0, 0]


def test_validation_is_repeatable_for_any_number_of_shards(folder):
    reference = inputs(validation(folder))
    np.testing.assert_array_equal(inputs(validation(folder)), reference)
    shards = [inputs(validation(folder, shard_index=i, shard_count=2)) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards, axis=1), reference)


@pytest.mark.parametrize(("limit", "count"), [(0, 3), (1, 1), (2, 2), (99, 3)])
def test_validation_limit(folder, limit, count):
    assert len(validation(folder, limit=limit)) == count


def test_too_few_tokens_are_refused(tmp_path):
    folder = make_folder(tmp_path, train=T, validation=1)
    with pytest.raises(UserError, match=r"the train split .* has only 7 tokens.* at least 8"):
        take(1, folder)
    with pytest.raises(UserError, match=r"the validation split .* has only 1 tokens.* at least 2"):
        validation(folder)


def test_batch_size_must_divide_over_processes(folder):
    message = r"batch_size=6 does not divide over 4 processes; use a multiple of 4"
    with pytest.raises(UsageError, match=message):
        take(1, folder, shard_count=4)
    with pytest.raises(UsageError, match=message):
        validation(folder, batch_size=6, shard_count=4)
