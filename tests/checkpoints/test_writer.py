"""Checkpoints written: all that was given, in time, without a word; or one line."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import META, abstract, make_trees, save

from llama_jax.checkpoints import run_folder
from llama_jax.checkpoints.restore import finished_steps, restore
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.errors import UserError


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


def test_a_spoilt_note_on_the_best_is_told_in_one_line(folder):
    (folder / "5" / "metrics" / "metrics").write_text("{garbage")
    with pytest.raises(UserError) as error:
        save(folder, {10: 1.0})
    assert "\n" not in str(error.value)
    assert finished_steps(folder) == [5, 9]


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
