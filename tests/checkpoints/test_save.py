"""Checkpoints saved in the background, errors of the disk in one line, and checksums."""

import contextlib
import gc
import logging
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import META, abstract, make_trees, save

from llama_jax.checkpoints.layout import quiet_orbax
from llama_jax.checkpoints.restore import finished_steps, restore
from llama_jax.checkpoints.save import CheckpointWriter, checksums, partial_checksum
from llama_jax.errors import UserError


def test_saving_prints_nothing(tmp_path, capfd):
    save(tmp_path / "ckpt", {1: 1.0})
    assert capfd.readouterr() == ("", "")


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The state at the call is saved, not what its memory holds later."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    (tmp_path / "ckpt").mkdir()
    writer = CheckpointWriter(tmp_path / "ckpt", 3)
    random = np.random.default_rng(0)
    for step in (1, 2, 3):
        model = {str(i): jnp.asarray(random.standard_normal(2**20, np.float32)) for i in range(4)}
        expected = {name: np.array(leaf) for name, leaf in model.items()}
        writer.save(step, model, {"count": jnp.int32(step)}, META, 1.0)
        for _ in range(4):
            model = jax.block_until_ready(overwrite(model))
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
    save(tmp_path / "ckpt", {8: 1.5, 9: 3.0, 10: float("inf"), 11: 3.0})  # another session
    assert finished_steps(tmp_path / "ckpt") == [2, 9, 10, 11]


def test_a_step_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """A process that is killed while it removes a step leaves no half of one."""
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        save(tmp_path / "ckpt", {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0})
    assert finished_steps(tmp_path / "ckpt") == [1, 3, 4, 5]
    left = tmp_path / "ckpt" / ".deleted" / "2"
    assert {path.name for path in left.iterdir()} >= {"model", "optimizer", "meta"}
    save(tmp_path / "ckpt", {6: 6.0})
    assert not left.parent.exists()


def test_damaged_record_of_the_best_is_one_line(folder):
    (folder / "5" / "metrics" / "metrics").write_text("{garbage")
    with pytest.raises(UserError) as error:
        save(folder, {10: 1.0})
    assert "\n" not in str(error.value)
    assert finished_steps(folder) == [5, 9]


def test_full_disk_is_found_before_anything_is_written(folder, monkeypatch):
    writer = CheckpointWriter(folder, 3)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000))
    trees = make_trees(10)
    with pytest.raises(UserError, match=r"has 3\.0 kB free, and a checkpoint takes 6\.9 kB; make"):
        writer.save(10, trees["model"], trees["optimizer"], META, 1.0)
    writer.close()
    assert finished_steps(folder) == [5, 9]


@contextlib.contextmanager
def largest_file(size):
    """Make writes beyond a file size fail, as those to a full disk do."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failed_background_save_is_one_line_and_leaves_nothing(folder, capfd):
    writer = CheckpointWriter(folder, 1)
    trees = make_trees(10, size=10_000)
    writer.raise_if_failed()
    with largest_file(100_000):
        writer.save(10, trees["model"], trees["optimizer"], META, 1.0)
        deadline = time.monotonic() + 30
        with pytest.raises(UserError) as error:
            while time.monotonic() < deadline:
                writer.raise_if_failed()
                time.sleep(0.01)
    writer.close()  # reports it once
    says = f"step 10 could not be saved in {folder}: File too large; the same command goes on"
    assert says in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["5", "9"]
    gc.collect()
    assert capfd.readouterr() == ("", "")
    save(folder, {10: 1.0})
    assert finished_steps(folder) == [5, 9, 10]


def test_folder_removed_during_the_run_is_named(folder):
    writer = CheckpointWriter(folder, 3)
    shutil.rmtree(folder)
    trees = make_trees(10)
    with pytest.raises(UserError, match="ckpt does not exist any more"):
        writer.save(10, trees["model"], trees["optimizer"], META, 1.0)
    writer.close()
    assert not folder.exists()


BROKEN = """
from llama_jax.checkpoints.layout import quiet_orbax
quiet_orbax()
class Error(Exception):
    def __str__(self):
        raise ValueError
class Broken:
    def __del__(self):
        raise Error
Broken()
kept = Broken()  # until the interpreter exits
"""


def test_the_hook_for_abandoned_reads_never_raises():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert done.stderr.count("Exception ignored in: <function Broken.__del__") == 2
    assert "unraisablehook" not in done.stderr


@pytest.mark.parametrize(
    ("message", "is_shown"),
    [
        ('Future exception was never retrieved\nfuture: ValueError(\'Error opening "zarr"', False),
        ("Task exception was never retrieved\nfuture: <Task coro=<orbax...", False),
        ("Task exception was never retrieved\nfuture: <Task coro=<serve...", True),
        ("Executing took 3 seconds, in orbax", True),
    ],
)
def test_errors_that_orbax_abandons_are_not_logged(message, is_shown, caplog):
    quiet_orbax()
    logging.getLogger("asyncio").error(message)
    assert (message in caplog.messages) is is_shown


# ---- checksums ----


def reference_checksum(array):
    """The definition, in Python's integers."""
    bits = np.asarray(array).reshape(-1).view(f"uint{array.dtype.itemsize * 8}").tolist()
    return sum(value * (2 * place + 1) for place, value in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "bool"])
def test_checksums_on_device_and_host_equal_the_definition(dtype):
    random = np.random.default_rng(0).standard_normal((3, 7, 5), np.float32)
    array = np.asarray(jnp.asarray(100 * random).astype(dtype))
    expected = reference_checksum(array)
    assert checksums({"a": array}) == {"a": expected}
    assert partial_checksum(array, part=17) == expected
    by_layer = [partial_checksum(layer, index * 35, part=17) for index, layer in enumerate(array)]
    assert sum(reversed(by_layer)) % 2**32 == expected


def test_checksums_of_views_and_scalars():
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert partial_checksum(array.T) == reference_checksum(array.T.copy())
    assert partial_checksum(np.float32(3).reshape(())) == checksums({"a": jnp.float32(3)})["a"]
    assert partial_checksum(np.zeros((0, 4), np.float32)) == 0


def test_changed_or_moved_elements_change_the_checksum():
    array = np.arange(1, 9, dtype=np.float16)
    swapped, negated = array.copy(), array.copy()
    swapped[[2, 3]] = swapped[[3, 2]]
    negated[5] *= -1
    assert len({partial_checksum(x) for x in (array, swapped, negated)}) == 3
