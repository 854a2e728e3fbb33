"""A trained model from its folder, however that is named and whatever is broken in it."""

import shutil

import jax
import numpy as np
import pytest
from tiny_run import make_config, make_tokens, quick_runs

from llama_jax.checkpoint import finished_steps
from llama_jax.errors import UserError
from llama_jax.loading import load
from llama_jax.training import fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the steps 4 and 8 of a run."""
    place = tmp_path_factory.mktemp("trained")
    tokens = make_tokens(place / "tokens").path
    config = make_config(tokens, place / "ckpt", optimizer__steps=8, run__save_every=4)
    with quick_runs(place / "cache"):
        assert fit(config) == 0
    return place / "ckpt"


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "ckpt")


def cut(step):
    files = sorted(path for path in (step / "model").rglob("*") if path.parent.name == "d")
    for path in files:
        path.write_bytes(path.read_bytes()[:100])


def test_the_newest_step_comes_with_all_that_it_needs(trained):
    loaded = load(trained)
    assert (loaded.step, loaded.bos, loaded.config.dim) == (8, True, 24)
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size == 320
    logits = loaded.model(np.array([[1, 5, 7]]))[0]
    assert logits.shape == (1, 3, 320) and np.isfinite(logits).all()
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(loaded.model))


def test_one_step_can_be_named(trained, monkeypatch):
    assert load(trained / "4").step == 4
    monkeypatch.chdir(trained.parent)
    assert load("ckpt/").step == 8
    assert load("ckpt/8/").step == 8
    monkeypatch.setenv("HOME", str(trained.parent))
    assert load("~/ckpt").step == 8
    first, last = (jax.tree.leaves(load(trained / step).model)[0] for step in ("4", "8"))
    assert (np.asarray(first) != np.asarray(last)).any()


def test_nothing_is_written(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    load(folder)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_a_damaged_step_is_passed_over_with_a_warning(folder, capsys):
    cut(folder / "8")
    assert load(folder).step == 4
    stderr = capsys.readouterr().err
    assert stderr.startswith("warning: ") and stderr.count("\n") == 1
    assert f"{folder}/8 is damaged" in stderr
    assert finished_steps(folder) == [4, 8]
    with pytest.raises(UserError, match="8 is damaged"):
        load(folder / "8")


def remove_steps(folder):
    for step in finished_steps(folder):
        (folder / str(step)).rename(folder / f"{step}.orbax-checkpoint-tmp")


def damage_all(folder):
    for step in finished_steps(folder):
        cut(folder / str(step))


def other_tokenizer(folder):
    make_tokens(folder / "other", vocab_size=330)
    shutil.copy(folder / "other" / "tokenizer.model", folder)


MISTAKES = {
    "has no finished checkpoint": remove_steps,
    "none of the checkpoints": damage_all,
    "does not exist": shutil.rmtree,
    "holds no run": lambda folder: (folder / "config.json").unlink(),
    "config.json is damaged": lambda folder: (folder / "config.json").write_text("{"),
    "has 330 pieces and the model 320": other_tokenizer,
}


@pytest.mark.parametrize("says", MISTAKES)
def test_what_is_missing_is_named_in_one_line(folder, says):
    MISTAKES[says](folder)
    with pytest.raises(UserError, match=says) as error:
        load(folder)
    assert "\n" not in str(error.value)
