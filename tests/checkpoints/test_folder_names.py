"""Folders with odd names: checkpoints are saved and restored there, or refused before a run."""

import os
from pathlib import Path

import pytest
from tiny_checkpoints import assert_is, newest, save

from llama_jax.checkpoints.restore import finished_steps
from llama_jax.checkpoints.run_folder import claimed
from llama_jax.errors import UsageError, UserError

NAMES = ["a b ", "a[b]", "[!a]*", "a?b", 'it\'s "q"', "größe-日本", "50%20", "-x", "#1", "~"]
NAMES += ["{a,b}", "a\nb", "$HOME:x"]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_saved_and_restored(tmp_path, name):
    folder = tmp_path / name / "runs"
    with claimed(folder):
        save(folder, {5: 1.0, 9: 2.0})
    assert_is(newest(folder)[0], 9)


def test_name_with_a_wildcard_does_not_match_its_neighbour(tmp_path):
    for name in ("run1", "run?"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, {5: 1.0})
        assert_is(newest(tmp_path / name)[0], 5)


@pytest.mark.parametrize("name", ["a\\b", os.fsdecode(b"a\xff")], ids=["backslash", "bytes"])
def test_names_that_tensorstore_cannot_open_are_refused_before_anything_is_written(tmp_path, name):
    folder = tmp_path / name
    with pytest.raises(UsageError, match="choose another folder") as error, claimed(folder):
        raise AssertionError("claimed")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_step_without_its_arrays_is_not_published(tmp_path, monkeypatch):
    folder = tmp_path / "ckpt"
    save(folder, {5: 1.0})
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # a file system that lists nothing
    with pytest.raises(
        UserError, match="is missing from the written files; the same command goes on from step 5"
    ) as error:
        save(folder, {9: 2.0}, keep_last=1)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert finished_steps(folder) == [5]
    assert_is(newest(folder)[0], 5)
