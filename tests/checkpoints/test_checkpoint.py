"""Checkpoints: what was saved is what comes back, bit by bit, or one line."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_checkpoints import META, WANTED, abstract, assert_is, data_files, make_trees, newest, save

from llama_jax.checkpoints import run_folder
from llama_jax.checkpoints.checkpoint import CheckpointWriter, restore
from llama_jax.checkpoints.steps import finished_steps
from llama_jax.config import MeshConfig
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import make_mesh


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with the steps 5 and 9, not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "ckpt"
    save(folder, {5: 2.0, 9: 3.0})
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it."""
    return shutil.copytree(good, tmp_path / "ckpt")


def test_what_is_saved_comes_back_bit_by_bit(good, capfd):
    restored, lines = newest(good)
    assert_is(restored, 9)
    assert_is(restore(good / "5", WANTED), 5)
    assert restored.meta["data"] == "fingerprint"
    assert lines == [] and capfd.readouterr() == ("", "")


def test_only_what_is_asked_for_is_read(good):
    restored = restore(good / "9", {"model": WANTED["model"]})
    assert list(restored.trees) == ["model"]


def test_saving_says_nothing_and_warns_of_nothing(tmp_path, capfd):
    save(tmp_path / "ckpt", {1: 1.0})
    assert capfd.readouterr() == ("", "")


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    """What lands on disk is the state at the call, not what its memory holds later."""
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    (tmp_path / "ckpt").mkdir()
    writer = CheckpointWriter(tmp_path / "ckpt", 3)
    random = np.random.default_rng(0)
    for step in (1, 2, 3):
        model = {str(i): jnp.asarray(random.standard_normal(2**20, np.float32)) for i in range(4)}
        expected = {name: np.array(leaf) for name, leaf in model.items()}
        writer.save(step, model, {"count": jnp.int32(step)}, META, 1.0)
        for _ in range(4):
            model = jax.block_until_ready(spoil(model))
        assert float(model["0"][0]) == -1
        writer.wait()
        restored = restore(tmp_path / "ckpt" / str(step), {"model": abstract(model)})
        for name, leaf in restored.trees["model"].items():
            np.testing.assert_array_equal(leaf, expected[name])
    writer.close()


def test_the_last_few_and_the_best_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: float("inf"), 4: 4.0, 5: float("nan"), 6: 3.0, 7: 2.0}
    save(tmp_path / "ckpt", losses)
    assert finished_steps(tmp_path / "ckpt") == [2, 5, 6, 7]
    save(tmp_path / "ckpt", {8: 1.5, 9: 3.0, 10: float("inf"), 11: 3.0})  # another sitting
    assert finished_steps(tmp_path / "ckpt") == [2, 9, 10, 11]


@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_a_single_flipped_bit_is_noticed(folder, item):
    files = data_files(folder / "9", item)
    assert files
    largest = max(files, key=lambda path: path.stat().st_size)
    content, noticed = largest.read_bytes(), 0
    for place in range(7, len(content), len(content) // 6):
        flipped = bytearray(content)
        flipped[place] ^= 1
        largest.write_bytes(flipped)
        restored, lines = newest(folder)
        assert_is(restored, 9 if not lines else 5)  # some bytes of the file mean nothing
        noticed += len(lines)
        assert all(f"{folder}/9 is damaged" in line and "falling back" in line for line in lines)
    assert noticed >= 3
    assert (folder / "9").is_dir()  # readers change nothing


def test_a_spoilt_note_on_the_best_is_told_in_one_line(folder):
    (folder / "5" / "metrics" / "metrics").write_text("{garbage")
    with pytest.raises(UserError) as error:
        save(folder, {10: 1.0})
    assert "\n" not in str(error.value)
    assert finished_steps(folder) == [5, 9]


def test_another_shape_or_name_is_refused_in_one_line(good):
    wrong = {"model": WANTED["model"] | {"extra": jax.ShapeDtypeStruct((2,), "float32")}}
    with pytest.raises(UserError, match=r"checkpoint .*/9 is damaged") as error:
        restore(good / "9", wrong)
    assert "\n" not in str(error.value)
    here = WANTED["optimizer"]["m"].sharding
    m = jax.ShapeDtypeStruct((4, 64), "float32", sharding=here)
    with pytest.raises(UserError, match=r"checkpoint .*/9 is damaged"):
        restore(good / "9", {"optimizer": WANTED["optimizer"] | {"m": m}})


def test_another_mesh_gets_the_same_bits(good):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wanted = dict(WANTED["model"])
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    wanted = abstract({"model": wanted}, NamedSharding(mesh, PartitionSpec()))
    shape = wanted["model"]["a"]["w"]
    wanted["model"]["a"]["w"] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    found = restore(good / "9", wanted).trees["model"]
    assert found["a"]["w"].sharding == place
    for old, new in zip(jax.tree.leaves(make_trees(9)["model"]), jax.tree.leaves(found)):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def test_a_full_disk_is_found_before_anything_is_written(folder, monkeypatch):
    writer = CheckpointWriter(folder, 3)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage._replace(free=3))
    trees = make_trees(10)
    with pytest.raises(UserError, match=r"has 0\.00 GB free, .* make room"):
        writer.save(10, trees["model"], trees["optimizer"], META, 1.0)
    writer.close()
    assert finished_steps(folder) == [5, 9]


def test_an_error_of_the_disk_is_one_line(folder, monkeypatch):
    writer = CheckpointWriter(folder, 3)

    def fail(*_, **__):
        raise OSError("first line\nand many more")

    monkeypatch.setattr(writer._manager, "wait_until_finished", fail)
    with pytest.raises(UserError, match=r"could not be written to .*: first line; older") as error:
        writer.wait()
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    writer.close()
