"""Checkpoints: what was saved is what comes back, or the one before it, or one line."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax import checkpoint, run_folder
from llama_jax.checkpoint import CheckpointWriter, finished_steps, restore, restore_newest
from llama_jax.config import MeshConfig
from llama_jax.errors import UserError
from llama_jax.sharding import make_mesh

META = {"data": "fingerprint"}


def make_trees(step, size=64):
    """A model and an optimizer state with every kind of array, other ones at each step."""
    random = np.random.default_rng(step)
    model = {
        "a": {"w": random.standard_normal((size, 24), np.float32), "b": np.float32([np.nan, -0.0])},
        "half": jnp.asarray(random.standard_normal(7), jnp.bfloat16),
        "flags": random.integers(0, 2, 9).astype(bool),
    }
    optimizer = {"count": np.int32(step), "m": random.standard_normal((3, size), np.float32)}
    return jax.tree.map(jnp.asarray, {"model": model, "optimizer": optimizer})


def abstract(trees, sharding=None):
    here = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), trees)


WANTED = abstract(make_trees(0))


def save(folder, losses, keep_last=3):
    """Checkpoints at the steps that are the keys, with the values as validation losses."""
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, keep_last)
    for step, loss in losses.items():
        trees = make_trees(step)
        writer.save(step, trees["model"], trees["optimizer"], META, loss)
    writer.close()


def assert_is(restored, step):
    """Bit by bit what was saved at a step."""
    assert restored.step == step
    expected, found = (jax.tree.leaves(tree) for tree in (make_trees(step), restored.trees))
    assert len(expected) == len(found) == 6
    for old, new in zip(expected, found):
        assert old.dtype == new.dtype and old.shape == new.shape
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


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


def newest(folder, **options):
    """The step that is restored, and the lines said."""
    lines = []
    restored = restore_newest(folder, WANTED, lines.append, **options)
    assert all("\n" not in line for line in lines)
    return restored, lines


def data_files(folder, item):
    """The files that hold an item's numbers."""
    return sorted(
        path for path in (folder / item).rglob("*") if path.is_file() and "/d/" in str(path)
    )


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


def truncate(step):
    for path in data_files(step, "model"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_arrays(step):
    for path in data_files(step, "optimizer"):
        path.unlink()


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def spoil_meta(step, text="{garbage"):
    (path,) = (path for path in (step / "meta").iterdir() if path.name == "metadata")
    path.write_text(text)


def link_inside(step):
    path = data_files(step, "model")[0]
    moved = step.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)


DAMAGE = {
    "an array file is cut": truncate,
    "an array file is gone": delete_arrays,
    "the folder is empty": empty,
    "an item is gone": lambda step: shutil.rmtree(step / "optimizer"),
    "meta is garbage": spoil_meta,
    "meta is another thing": lambda step: spoil_meta(step, "[]"),
    "meta lacks checksums": lambda step: spoil_meta(step, json.dumps(META)),
    "a link leads outside": link_inside,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_in_one_line_and_set_aside(folder, damage):
    DAMAGE[damage](folder / "9")
    restored, lines = newest(folder, set_aside=True)
    assert_is(restored, 5)
    assert len(lines) == 1 and f"{folder}/9" in lines[0]
    assert finished_steps(folder) == [5]
    assert (folder / "9.damaged-1").is_dir()
    save(folder, {9: 1.0})  # its step can be written again
    assert_is(newest(folder)[0], 9)


def test_when_all_are_damaged_none_is_touched(folder):
    for step in (5, 9):
        truncate(folder / str(step))
    for _ in range(2):  # a second start must not take the folder for a new run's
        with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read"):
            newest(folder, set_aside=True)
    assert finished_steps(folder) == [5, 9]


def test_what_is_no_checkpoint_is_ignored_and_left_alone(folder):
    names = ["abc", "-1", "99999999999", "007", "٣", "12.orbax-checkpoint-tmp", "9.damaged-1"]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "file").write_text("mine")
    (folder / "30").write_text("a file")
    outside = shutil.copytree(folder / "5", folder.parent / "outside")
    shutil.rmtree(outside / "metrics")
    (folder / "31").symlink_to(outside)
    assert finished_steps(folder) == [5, 9]
    assert_is(newest(folder, set_aside=True)[0], 9)
    save(folder, dict.fromkeys((10, 11, 12, 13, 14), 9.0))
    assert finished_steps(folder) == [5, 12, 13, 14]
    for name in set(names) - {"12.orbax-checkpoint-tmp"}:
        assert (folder / name / "file").read_text() == "mine"
    assert (folder / "31").is_symlink() and (folder / "30").is_file()
    assert_is(newest(folder)[0], 14)


def test_a_spoilt_note_on_the_best_is_told_in_one_line(folder):
    (folder / "5" / "metrics" / "metrics").write_text("{garbage")
    with pytest.raises(UserError) as error:
        save(folder, {10: 1.0})
    assert "\n" not in str(error.value)
    assert finished_steps(folder) == [5, 9]


def test_a_folder_without_finished_checkpoints_holds_none(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert newest(tmp_path) == (None, [])


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


def test_a_path_means_one_step_or_all(good):
    steps = [path.name for path in checkpoint.checkpoint_paths(good)]
    assert steps == ["9", "5"]
    assert list(checkpoint.checkpoint_paths(Path(good / "5"))) == [good / "5"]
