"""Global batches: each process reads exactly the sequences of its devices, and places them."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from tiny_run import make_tokens

from llama_jax.data.loader import Batch, GlobalBatches, merge_shards, shard_starts, training_batches
from llama_jax.distributed.mesh import MESH_AXES, batch_sharding, batch_shards

B, T = 24, 5


def mesh_of(shape, order=range(8)):
    """Return a mesh over the simulated devices, in this order."""
    devices = np.array(jax.devices())[list(order)].reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def numbered(shard_index=0, shard_count=1):
    """Yield shards of batches in which each sequence holds its number in the batch."""
    size = B // shard_count
    for step in itertools.count():
        numbers = np.arange(shard_index * size, (shard_index + 1) * size)
        inputs_BT = np.int32(numbers[:, None] + 100 * step + np.zeros((size, T), np.int32))
        yield Batch(inputs_BT=inputs_BT, targets_BT=inputs_BT + 1, weights_BT=np.float32(inputs_BT))


MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
ORDERS = {
    "in order": range(8),
    "as a ring": [0, 1, 3, 2, 6, 7, 5, 4],
    "odd": [0, 2, 4, 6, 1, 3, 5, 7],
}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_processes_read_exactly_the_sequences_of_their_devices(shape, order, processes):
    mesh = mesh_of(shape, ORDERS[order])
    sharding, length = batch_sharding(mesh), B // batch_shards(mesh)
    indices = sharding.devices_indices_map((B,))
    seen = set()
    for process in range(processes):
        devices = jax.devices()[process * 8 // processes :][: 8 // processes]
        held = sorted({number for device in devices for number in range(B)[indices[device][0]]})
        shards = merge_shards(shard_starts(sharding, B, devices), length, B)
        read = [next(numbered(*shard)).inputs_BT[:, 0] for shard in shards]
        assert np.concatenate(read).tolist() == held
        seen |= set(held)
    assert seen == set(range(B))


def test_adjacent_shards_are_merged():
    assert merge_shards([0, 6], 6, 24) == [(0, 2)]
    assert merge_shards([12, 18], 6, 24) == [(1, 2)]
    assert merge_shards([6, 12], 6, 24) == [(1, 4), (2, 4)]  # no shard of 12 starts at 6
    assert merge_shards([0, 12], 6, 24) == [(0, 4), (2, 4)]
    assert merge_shards([0, 6, 12], 6, 24) == [(0, 4), (1, 4), (2, 4)]
    assert merge_shards([0, 6, 12, 18], 6, 24) == [(0, 1)]


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_sequences_are_placed_on_the_devices_of_the_sharding(monkeypatch, order, is_alone):
    if not is_alone:  # use the code path of several processes
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = mesh_of((2, 2, 2), ORDERS[order])
    batches = GlobalBatches(numbered, B, mesh)
    for step in range(2):
        batch = next(batches)
        assert batch.inputs_BT.sharding == batch_sharding(mesh)
        for shard in batch.inputs_BT.addressable_shards:
            assert shard.data.shape == (B // 4, T)
            expected = np.arange(B)[shard.index[0]] + 100 * step
            np.testing.assert_array_equal(shard.data[:, 0], expected)
        np.testing.assert_array_equal(batch.targets_BT, np.asarray(batch.inputs_BT) + 1)
        assert batch.segments_BT is None
    batches.close()


def test_shards_of_real_data_make_up_the_batch_of_one_process(tmp_path):
    tokens = make_tokens(tmp_path / "tokens")

    def read(**shard):
        return training_batches(tokens, batch_size=B, sequence_length=T, seed=3, **shard)

    whole = next(read())
    mesh = mesh_of((2, 4, 1), ORDERS["as a ring"])
    starts = shard_starts(batch_sharding(mesh), B, jax.devices()[2:4])
    assert starts == [6, 9]
    parts = [read(shard_index=i, shard_count=n) for i, n in merge_shards(starts, 3, B)]
    found = np.concatenate([next(part).inputs_BT for part in parts])
    np.testing.assert_array_equal(found, whole.inputs_BT[6:12])
    for part in parts:
        part.close()


def test_iteration_ends_with_the_sources_and_close_closes_them(tmp_path):
    batches = GlobalBatches(
        lambda **shard: itertools.islice(numbered(**shard), 2), B, mesh_of((8, 1, 1))
    )
    assert len(list(batches)) == 2
    closed = []

    class Source:
        def close(self):
            closed.append(1)

    GlobalBatches(lambda **shard: Source(), B, mesh_of((8, 1, 1))).close()
    assert closed == [1]
