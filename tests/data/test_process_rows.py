"""Each process reads the rows that its devices hold, no others, and they end where they belong."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from tiny_run import make_tokens

from llama_jax.data import loader as process_rows
from llama_jax.data.loader import Batch, GlobalBatches, first_rows, shares, training_batches
from llama_jax.distributed.mesh import MESH_AXES, batch_sharding, batch_shards

B, T = 24, 5


def mesh_of(shape, order=range(8)):
    """A mesh over the pretend devices, in this order."""
    devices = np.array(jax.devices())[list(order)].reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def numbered(process_index=0, process_count=1):
    """Batches whose rows tell their number, as `training_batches` shares them out."""
    share = B // process_count
    for step in itertools.count():
        rows = np.arange(process_index * share, (process_index + 1) * share)
        rows_BT = np.int32(rows[:, None] + 100 * step + np.zeros((share, T), np.int32))
        yield Batch(inputs_BT=rows_BT, targets_BT=rows_BT + 1, weights_BT=np.float32(rows_BT))


MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
ORDERS = {
    "in order": range(8),
    "as a ring": [0, 1, 3, 2, 6, 7, 5, 4],
    "odd": [0, 2, 4, 6, 1, 3, 5, 7],
}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_processes_read_just_the_rows_that_their_devices_hold(shape, order, processes):
    mesh = mesh_of(shape, ORDERS[order])
    sharding, length = batch_sharding(mesh), B // batch_shards(mesh)
    places = sharding.devices_indices_map((B,))
    seen = set()
    for number in range(processes):
        devices = jax.devices()[number * 8 // processes :][: 8 // processes]
        held = sorted({row for device in devices for row in range(B)[places[device][0]]})
        cuts = shares(first_rows(sharding, B, devices), length, B)
        read = [next(numbered(*cut)).inputs_BT[:, 0] for cut in cuts]
        assert np.concatenate(read).tolist() == held
        seen |= set(held)
    assert seen == set(range(B))


def test_rows_side_by_side_are_read_at_once():
    assert shares([0, 6], 6, 24) == [(0, 2)]
    assert shares([12, 18], 6, 24) == [(1, 2)]
    assert shares([6, 12], 6, 24) == [(1, 4), (2, 4)]  # no share begins at 6 and ends at 18
    assert shares([0, 12], 6, 24) == [(0, 4), (2, 4)]
    assert shares([0, 6, 12], 6, 24) == [(0, 4), (1, 4), (2, 4)]
    assert shares([0, 6, 12, 18], 6, 24) == [(0, 1)]


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_end_on_the_devices_that_hold_them(monkeypatch, order, is_alone):
    if not is_alone:  # takes the way of several processes, all devices being its own
        monkeypatch.setattr(process_rows.jax, "process_count", lambda: 2)
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


def test_parts_of_real_data_make_up_the_batch_of_one_process(tmp_path):
    tokens = make_tokens(tmp_path / "tokens")

    def read(**share):
        return training_batches(tokens, batch_size=B, sequence_length=T, seed=3, **share)

    whole = next(read())
    mesh = mesh_of((2, 4, 1), ORDERS["as a ring"])
    firsts = first_rows(batch_sharding(mesh), B, jax.devices()[2:4])
    assert firsts == [6, 9]
    parts = [read(process_index=i, process_count=n) for i, n in shares(firsts, 3, B)]
    found = np.concatenate([next(part).inputs_BT for part in parts])
    np.testing.assert_array_equal(found, whole.inputs_BT[6:12])
    for part in parts:
        part.close()


def test_an_end_is_an_end_and_closing_closes(tmp_path):
    batches = GlobalBatches(
        lambda **share: itertools.islice(numbered(**share), 2), B, mesh_of((8, 1, 1))
    )
    assert len(list(batches)) == 2
    closed = []

    class Source:
        def close(self):
            closed.append(1)

    GlobalBatches(lambda **share: Source(), B, mesh_of((8, 1, 1))).close()
    assert closed == [1]
