"""Checkpoints restored: the newest intact step, to the bit, or an error in one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_checkpoints import (
    META,
    WANTED,
    abstract,
    assert_is,
    data_files,
    make_trees,
    newest,
    save,
)

from llama_jax.checkpoints.layout import finished_steps, read_json
from llama_jax.checkpoints.restore import folder_and_step, newest_intact, restore
from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.errors import UserError


def test_restored_arrays_equal_the_saved_ones_to_the_bit(good, capfd):
    restored, lines = newest(good)
    assert_is(restored, 9)
    assert_is(restore(good / "5", WANTED), 5)
    assert restored.meta["data"] == "fingerprint"
    assert lines == [] and capfd.readouterr() == ("", "")


def test_only_requested_items_are_read(good):
    restored = restore(good / "9", {"model": WANTED["model"]})
    assert list(restored.trees) == ["model"]


@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_single_flipped_bit_is_detected(folder, item):
    files = data_files(folder / "9", item)
    assert files
    largest = max(files, key=lambda path: path.stat().st_size)
    content, detected = largest.read_bytes(), 0
    for place in range(7, len(content), len(content) // 6):
        flipped = bytearray(content)
        flipped[place] ^= 1
        largest.write_bytes(flipped)
        restored, lines = newest(folder)
        assert_is(restored, 9 if not lines else 5)  # some bytes of the file are unused
        detected += len(lines)
        assert all(f"{folder}/9 is damaged" in line and "falling back" in line for line in lines)
    assert detected >= 3
    assert (folder / "9").is_dir()  # readers change nothing


def test_other_names_and_shapes_are_one_line(good):
    here = WANTED["optimizer"]["m"].sharding
    m = jax.ShapeDtypeStruct((4, 64), "float32", sharding=here)
    less = {name: leaf for name, leaf in WANTED["model"].items() if name != "half"}
    for wanted, says in (
        ({"model": WANTED["model"] | {"more": m}}, "model.more is missing in the .* and .4, 64."),
        ({"model": less}, "model.half is .7. in the checkpoint and missing in the config's model"),
        ({"optimizer": WANTED["optimizer"] | {"m": m}}, "optimizer.m is .3, 64. in .* and .4, 64."),
    ):
        with pytest.raises(UserError, match=f"9 does not fit its config.json: {says}") as error:
            restore(good / "9", wanted)
        assert "\n" not in str(error.value)


def test_flipped_bit_in_the_metadata_is_detected(folder):
    """A flip that is not refused changes no key and no value."""
    path = folder / "9" / "meta" / "metadata"
    content, expected = path.read_bytes(), newest(folder)[0].meta
    outcomes = []
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_json(path.parent)
        except ValueError:
            outcomes.append("refused")
        else:
            outcomes.append("harmless")
            assert expected.items() <= found.items()
    path.write_bytes(content)
    assert outcomes.count("refused") > 0.9 * len(outcomes)


def test_arrays_on_another_mesh_are_the_same_bits(good):
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


def truncate(step):
    for path in data_files(step, "model"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_arrays(step):
    for path in data_files(step, "optimizer"):
        path.unlink()


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def write_meta(step, text="{garbage"):
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
    "meta is garbage": write_meta,
    "meta is a list": lambda step: write_meta(step, "[]"),
    "meta is nested deeply": lambda step: write_meta(step, "[" * 100_000),
    "meta lacks checksums": lambda step: write_meta(step, json.dumps(META)),
    "a link leads outside": link_inside,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_one_line_and_set_aside(folder, damage):
    DAMAGE[damage](folder / "9")
    restored, lines = newest(folder, set_aside=True)
    assert_is(restored, 5)
    assert len(lines) == 1 and f"{folder}/9" in lines[0]
    assert finished_steps(folder) == [5]
    assert (folder / "9.damaged-1").is_dir()
    save(folder, {9: 1.0})  # its step can be written again
    assert_is(newest(folder)[0], 9)


def test_nothing_is_renamed_when_all_are_damaged(folder):
    for step in (5, 9):
        truncate(folder / str(step))
    for _ in range(2):  # the second start must not take the folder for that of a new run
        with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read"):
            newest(folder, set_aside=True)
    assert finished_steps(folder) == [5, 9]


def test_damage_to_the_only_checkpoint_is_one_line(folder):
    shutil.rmtree(folder / "5")
    truncate(folder / "9")
    with pytest.raises(UserError, match="9 is damaged") as error:
        newest(folder, set_aside=True)
    assert "falling back" not in str(error.value)
    assert finished_steps(folder) == [9]


def test_step_that_a_run_replaces_meanwhile_is_read_again(folder):
    shutil.rmtree(folder / "5")

    def read(path):
        if path.name == "9":
            path.rename(folder / "12")  # as if 9 were deleted after 12 was saved
        return restore(path, WANTED)

    lines = []
    assert newest_intact(folder, read, lines.append).step == 12
    assert lines == []


def test_other_files_and_folders_are_ignored_and_kept(folder):
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


def test_folder_without_finished_checkpoints(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert newest(tmp_path) == (None, [])


def test_path_names_one_step_or_all(good, monkeypatch):
    assert folder_and_step(good) == (good, None)
    assert folder_and_step(f"{good}/5/") == (good, good / "5")
    assert folder_and_step(good / "7") == (good / "7", None)
    monkeypatch.chdir(good / "9")
    assert folder_and_step(".") == (good, good / "9")
    monkeypatch.setenv("HOME", str(good))
    assert folder_and_step("~") == (good, None)
