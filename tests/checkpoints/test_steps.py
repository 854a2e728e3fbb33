"""The steps of a folder: the newest that is whole, whatever became of the others."""

import json
import shutil

import pytest
from tiny_checkpoints import META, WANTED, assert_is, data_files, newest, save

from llama_jax.checkpoints.restore import finished_steps, folder_and_step, newest_intact, restore
from llama_jax.errors import UserError


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
    "meta is nested deeply": lambda step: spoil_meta(step, "[" * 100_000),
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


def test_the_only_one_is_told_to_be_damaged_in_one_line(folder):
    shutil.rmtree(folder / "5")
    truncate(folder / "9")
    with pytest.raises(UserError, match="9 is damaged") as error:
        newest(folder, set_aside=True)
    assert "falling back" not in str(error.value)
    assert finished_steps(folder) == [9]


def test_a_step_that_a_run_replaces_meanwhile_is_not_called_damaged(folder):
    shutil.rmtree(folder / "5")

    def read(path):
        if path.name == "9":
            path.rename(folder / "12")  # as if 9 were deleted after 12 was saved
        return restore(path, WANTED)

    lines = []
    assert newest_intact(folder, read, lines.append).step == 12
    assert lines == []


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


def test_a_folder_without_finished_checkpoints_holds_none(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert newest(tmp_path) == (None, [])


def test_a_path_means_one_step_or_all(good, monkeypatch):
    assert folder_and_step(good) == (good, None)
    assert folder_and_step(f"{good}/5/") == (good, good / "5")
    assert folder_and_step(good / "7") == (good / "7", None)
    monkeypatch.chdir(good / "9")
    assert folder_and_step(".") == (good, good / "9")
    monkeypatch.setenv("HOME", str(good))
    assert folder_and_step("~") == (good, None)
