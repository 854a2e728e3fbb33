"""Runs that start from a checkpoint: resumed to the bit, small checkpoints, the right base."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import fit, make_config, make_tokens, quick_runs

from llama_jax.checkpoints.load import load, load_for_inference
from llama_jax.errors import UserError
from llama_jax.training.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Runs on one device, whose programs are compiled once for the whole file."""
    with quick_runs(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens").path


@pytest.fixture(scope="module")
def base(tokens, tmp_path_factory):
    """A model that has learned something, in float32."""
    folder = tmp_path_factory.mktemp("base") / "ckpt"
    fit(make_config(tokens, folder, model__dropout=0.0))
    return folder


def tuned(tokens, base, folder, **changes):
    """The config of a run that tunes `base`; rank 3 unless `changes` has another `lora__rank`."""
    settings = {
        "run__init_from": str(base),
        "lora__rank": 3,
        "lora__dropout": 0.1,
        "optimizer__steps": 10,
        "optimizer__warmup_steps": 0,
        "model__dropout": 0.0,
        "data__packing": "documents",
    }
    # The source of adapters has to be set before their rank.
    return make_config(tokens, folder, **settings | changes)


def checksums(folder, step):
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["checksums"]


KINDS = {
    "lora": {},
    "qlora": {"lora__base": "nf4", "lora__double_quantization": True},
    "all": {"lora__rank": 0, "lora__dropout": 0.0, "model__dropout": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted_to_the_bit(tokens, base, tmp_path, kind):
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    assert fit(tuned(tokens, base, straight, **KINDS[kind])) == 0
    assert fit(tuned(tokens, base, parted, **KINDS[kind])) == 0
    shutil.rmtree(parted / "10")  # back to step 5
    assert fit(tuned(tokens, base, parted, **KINDS[kind])) == 0
    assert checksums(straight, 10) == checksums(parted, 10)
    losses = [record["loss"] for record in read_metrics(straight).values() if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_adapters_is_small_and_names_its_base(tokens, base, tmp_path):
    folder = tmp_path / "lora"
    fit(tuned(tokens, base, folder))
    meta = json.loads((folder / "10" / "meta" / "metadata").read_text())
    assert meta["base"] == load(base).fingerprint
    names = set(meta["checksums"]["model"])
    assert "blocks.attention.wq.a" in names and "embedding" not in names
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(load(base).model))
    item = sum(path.stat().st_size for path in (folder / "10" / "model").rglob("*"))
    assert item < stored


def test_a_loaded_run_is_the_base_with_its_adapters(tokens, base, tmp_path):
    folder = tmp_path / "lora"
    fit(tuned(tokens, base, folder))
    tokens_BT = np.arange(24).reshape(2, 12)
    stacked, unstacked = load(folder), load_for_inference(folder)
    logits = stacked.model(tokens_BT)[0]
    np.testing.assert_allclose(unstacked.model(tokens_BT)[0], logits, atol=1e-5)
    assert np.abs(logits - load(base).model(tokens_BT)[0]).max() > 1e-2


def test_another_base_is_refused(tokens, base, tmp_path):
    folder, other = tmp_path / "lora", tmp_path / "other"
    fit(tuned(tokens, base, folder))
    fit(make_config(tokens, other, model__dropout=0.0, run__seed=5))
    with pytest.raises(UserError, match="trained for another model"):
        load(folder, base=str(other))
    with pytest.raises(UserError, match=r"is not the model that step 10 of .* was trained on"):
        fit(tuned(tokens, other, folder, optimizer__steps=12))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__dim": 48}, "model.dim=48 is not that of"),
        ({"lora__targets": "wq,attn"}, "lora.targets has 'attn', which matches nothing"),
        ({"lora__targets": "output"}, "the embedding is the output matrix"),
        ({"lora__rank": 25}, "lora.rank=25 is more than the"),
        ({"lora__base": "stored-int8"}, "lora.base='stored-int8' does not fit"),
        ({"run__init_from": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_does_not_fit_the_base_is_one_line(tokens, base, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        fit(tuned(tokens, base, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
