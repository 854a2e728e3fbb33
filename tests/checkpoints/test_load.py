"""Models loaded from trained and converted folders, and damage there in one line."""

import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from cases import slow
from flax import nnx
from tiny_run import fit, make_config, make_tokens
from tiny_weights import tiny_weights

from llama_jax.checkpoints.layout import finished_steps
from llama_jax.checkpoints.load import abstract_for_inference, load, load_for_inference
from llama_jax.errors import UsageError, UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.parameters import named_leaves
from llama_jax.model.transformer import Llama
from llama_jax.training.initial import base_description


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the steps 4 and 8 of a run."""
    place = tmp_path_factory.mktemp("trained")
    tokens = make_tokens(place / "tokens").path
    sizes = {"model__num_layers": 1, "model__dropout": 0.0}
    config = make_config(tokens, place / "ckpt", optimizer__steps=8, run__save_every=4, **sizes)
    assert fit(config) == 0
    return place / "ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("position", ["absolute", pytest.param("relative", marks=pytest.mark.slow)])
def test_learned_positions_are_trained_saved_resumed_and_loaded(tmp_path, position):
    tokens = make_tokens(tmp_path / "tokens", stories=40).path
    sizes = {"model__num_layers": 1, "model__dropout": 0.0, "model__position": position}
    for steps in (4, 6):  # the second time resumed
        lengths = {"optimizer__warmup_steps": 0, "optimizer__steps": steps}
        config = make_config(tokens, tmp_path / "ckpt", **lengths, **sizes)
        assert fit(config) == 0
    loaded = load(tmp_path / "ckpt")
    assert (loaded.step, loaded.config.position) == (6, position)
    first = Llama(loaded.config, rngs=nnx.Rngs(config.run.seed))
    for model in (load_for_inference(tmp_path / "ckpt", max_context=20).model, loaded.model):
        block = model.blocks[0] if isinstance(model.blocks, nnx.List) else model.blocks
        learned = model.position_embedding if position == "absolute" else block.attention.slopes
        old = first.position_embedding if position == "absolute" else np.ones_like(learned)
        assert np.abs(learned[...] - old[...]).max() > 1e-3
    tuned = {"run__init_from": str(tmp_path / "ckpt"), "model__context_length": 64}
    with pytest.raises(UsageError, match=r"context_length=64 is not that of .*, which is 32"):
        base_description(make_config(tokens, tmp_path / "new", **sizes, **tuned))
    if position == "absolute":
        with pytest.raises(UserError, match=r"max_context=40 .*expected 2 to 32"):
            load_for_inference(tmp_path / "ckpt", max_context=40)
    else:
        longer = load_for_inference(tmp_path / "ckpt", max_context=40).model
        deltas = Engine(longer).generate(
            Request(prompts=[[1, 2]], params=[SamplingParams(max_tokens=50)])
        )
        assert sum(len(delta.ids) for delta in deltas) == 38


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "ckpt")


def truncate(step):
    files = sorted(path for path in (step / "model").rglob("*") if path.parent.name == "d")
    for path in files:
        path.write_bytes(path.read_bytes()[:100])


def test_load_returns_the_newest_step_with_config_and_tokenizer(trained):
    loaded = load(trained)
    assert (loaded.step, loaded.bos, loaded.config.dim) == (8, True, 24)
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size == 320
    logits = loaded.model(np.array([[1, 5, 7]]))[0]
    assert logits.shape == (1, 3, 320) and np.isfinite(logits).all()
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(loaded.model))


def test_path_of_a_step_loads_that_step(trained, monkeypatch):
    assert load(trained / "4").step == 4
    monkeypatch.chdir(trained.parent)
    assert load("ckpt/").step == 8
    assert load("ckpt/8/").step == 8
    monkeypatch.setenv("HOME", str(trained.parent))
    assert load("~/ckpt").step == 8
    first, last = (jax.tree.leaves(load(trained / step).model)[0] for step in ("4", "8"))
    assert (np.asarray(first) != np.asarray(last)).any()


def test_loading_writes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    load(folder)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_damaged_step_is_skipped_with_a_warning(folder, capsys):
    truncate(folder / "8")
    assert load(folder).step == 4
    stderr = capsys.readouterr().err
    assert stderr.startswith("warning: ") and stderr.count("\n") == 1
    assert f"{folder}/8 is damaged" in stderr
    assert finished_steps(folder) == [4, 8]
    with pytest.raises(UserError, match="8 is damaged"):
        load(folder / "8")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders of converted models by the dtype they are stored in."""
    folders = {}
    for dtype, compute_dtype in COMPUTE.items():
        folders[dtype] = tmp_path_factory.mktemp("converted") / dtype
        weights = tiny_weights(dtype, compute_dtype=compute_dtype)
        checkpoint_folder.write(weights, folders[dtype])
    return folders


COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
LOADED = {  # stored, backend, requested dtype: dtype of parameters, of arithmetic
    ("bfloat16", "cpu", ""): ("float32", "float32"),  # bfloat16 is slow on CPU
    ("bfloat16", "gpu", ""): ("bfloat16", "bfloat16"),
    ("float16", "tpu", ""): ("bfloat16", "bfloat16"),
    ("float32", "gpu", ""): ("float32", "float32"),
    ("float32", "gpu", "bfloat16"): ("bfloat16", "bfloat16"),
    ("bfloat16", "cpu", "bfloat16"): ("bfloat16", "bfloat16"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case[1] == "tpu")) for case in LOADED],
    ids=str,
)
def test_dtypes_of_parameters_and_arithmetic(converted, monkeypatch, case):
    stored, backend, dtype = case
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loaded = load(converted[stored], dtype=dtype)
    leaves = named_leaves(loaded.model)
    assert ({leaf.dtype.name for leaf in leaves.values()}, loaded.config.compute_dtype) == (
        {LOADED[case][0]},
        LOADED[case][1],
    )
    assert loaded.model.config == loaded.config
    expected = tiny_weights(stored).tensors["embedding"].read().astype(LOADED[case][0])
    np.testing.assert_array_equal(leaves["embedding"], expected)
    assert loaded.model(np.array([[1, 5]]))[0].dtype == np.float32


@pytest.mark.parametrize(
    ("stored", "platform", "options"),
    [
        ("bfloat16", "cpu", {}),
        slow(("float16", "tpu", {"max_context": 5})),
        slow(("float32", "cpu", {"dtype": "bfloat16"})),
        ("bfloat16", "tpu", {"quantize": "int8"}),
        slow(("float32", "cpu", {"quantize": "int4"})),
    ],
)
def test_shapes_to_compile_for_are_those_of_the_loaded_model(
    converted, monkeypatch, stored, platform, options
):
    jax.clear_caches()  # JAX keeps shapes by function, not by platform
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    expected = load_for_inference(converted[stored], **options).model
    found = abstract_for_inference(converted[stored], **options)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, leaf in named_leaves(found).items():
        array = named_leaves(expected)[name]
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (array.shape, array.dtype, array.sharding)
        assert isinstance(leaf, jax.ShapeDtypeStruct)


def test_trained_model_computes_in_its_compute_dtype_but_on_cpu(trained, monkeypatch):
    assert load(trained).model.embedding.dtype == np.float32
    path = trained / "config.json"
    before = path.read_text()
    try:
        path.write_text(before.replace('"compute_dtype": "float32"', '"compute_dtype": "bfloat16"'))
        assert load(trained).config.compute_dtype == "float32"
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        loaded = load(trained)
        assert (loaded.config.compute_dtype, loaded.model.embedding.dtype) == (
            "bfloat16",
            np.float32,
        )
    finally:
        path.write_text(before)


def test_unknown_dtype_is_refused(converted):
    with pytest.raises(UsageError, match="dtype='float16' is unknown"):
        load(converted["float32"], dtype="float16")


def remove_steps(folder):
    for step in finished_steps(folder):
        (folder / str(step)).rename(folder / f"{step}.orbax-checkpoint-tmp")


def damage_all(folder):
    for step in finished_steps(folder):
        truncate(folder / str(step))


def other_tokenizer(folder):
    make_tokens(folder / "other", vocab_size=330)
    shutil.copy(folder / "other" / "tokenizer.model", folder)


MISTAKES = {
    "has no finished checkpoint": remove_steps,
    "none of the checkpoints": damage_all,
    "does not exist": shutil.rmtree,
    "holds no run": lambda folder: (folder / "config.json").unlink(),
    "config.json is damaged": lambda folder: (folder / "config.json").write_text("{"),
    "tokenizer.model is not the file that the checkpoint was saved with": other_tokenizer,
}


@pytest.mark.parametrize("says", MISTAKES)
def test_missing_and_damaged_files_are_named_in_one_line(folder, says):
    MISTAKES[says](folder)
    with pytest.raises(UserError, match=says) as error:
        load(folder)
    assert "\n" not in str(error.value)


def strip_checksums(folder):
    """Make the metadata of a folder what earlier versions wrote."""
    for step in finished_steps(folder):
        path = folder / str(step) / "meta" / "metadata"
        tree = json.loads(path.read_text())
        assert tree.keys() >= {"tokenizer.model", "checksum"}
        path.write_text(json.dumps({"checksums": tree["checksums"], "data": tree["data"]}))


def test_folders_of_earlier_versions_are_loaded(folder):
    strip_checksums(folder)
    assert load(folder).step == 8
    other_tokenizer(folder)
    with pytest.raises(UserError, match="has 330 pieces and the model 320"):
        load(folder)


def test_flipped_bit_in_the_tokenizer_is_detected(folder, converted, tmp_path):
    copy = shutil.copytree(converted["float32"], tmp_path / "model")
    for place, read in ((folder, load), (copy, load), (copy, checkpoint_folder.read)):
        path = place / "tokenizer.model"
        content = path.read_bytes()
        path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        with pytest.raises(UserError, match="model is not the file"):
            read(place)
        path.write_bytes(content)
        read(place)


@pytest.mark.parametrize("read", [load, checkpoint_folder.read])
def test_config_of_another_model_is_one_line(folder, read, capsys):
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    tree["config"]["model"]["hidden_dim"] += 8
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as error:
        read(folder)
    says = (
        r"8 does not fit its config.json: model.blocks.*\.kernel is \[[\d, ]+\] in the checkpoint"
    )
    assert re.search(says, str(error.value)) and "\n" not in str(error.value)
    assert capsys.readouterr().err.count("\n") == 1  # the config was edited


def test_unreadable_step_is_reported_as_permission_denied(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="8 cannot be read: Permission denied; ask for access"):
        load(folder / "8")


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 2 * 10**9}, {"num_layers": 2 * 10**9}, {"dim": 24 * 10**6}], ids=str
)
@pytest.mark.parametrize("kind", ["run", "model"])
def test_sizes_that_the_files_cannot_hold_are_refused_before_allocating(
    folder, converted, tmp_path, kind, changes
):
    if kind == "model":
        folder = shutil.copytree(converted["float32"], tmp_path / "model")
    tree = json.loads((folder / "config.json").read_text())
    model = tree["config"]["model"] if kind == "run" else tree["model"]
    model.update(changes)
    (folder / "config.json").write_text(json.dumps(tree))
    step = folder / str(finished_steps(folder)[-1])
    with pytest.raises(UserError, match=r"cannot hold the .* numbers of its config") as error:
        load(step)
    assert "\n" not in str(error.value)
