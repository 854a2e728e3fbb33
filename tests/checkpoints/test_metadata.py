"""The config.json of runs and converted models: written, read back, and refused when damaged."""

import dataclasses
import json

import pytest
from tiny_run import make_config

from llama_jax.checkpoints.metadata import (
    Description,
    Run,
    read_description,
    read_run,
    write_description,
    write_run,
)
from llama_jax.errors import UserError
from llama_jax.quantization import QuantizationConfig

RUN = Run(config=make_config("tokens", "ckpt"), bos=True, eos=False)
MODEL = Description(model=RUN.config.model, bos=False, eos=True)


def error_of(act, folder):
    with pytest.raises(UserError) as error:
        act(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_run_is_written_and_read(tmp_path):
    write_run(tmp_path, RUN)
    assert read_run(tmp_path) == RUN
    expected = Description(model=RUN.config.model, bos=True, eos=False)
    assert read_description(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_model_is_written_and_read_and_is_no_run(tmp_path):
    write_description(tmp_path, MODEL)
    assert read_description(tmp_path) == MODEL
    assert "holds a converted model, not a run; choose" in error_of(read_run, tmp_path)


def test_quantisation_and_what_a_conversion_knows_are_stored(tmp_path):
    int4 = QuantizationConfig("int4", 64)
    expected = dataclasses.replace(
        MODEL,
        quantization=int4,
        chat_template="{{ messages }}",
        stop_ids=(2, 7),
        generation={"temperature": 0.6, "top_k": 20},
    )
    write_description(tmp_path, expected)
    assert read_description(tmp_path) == expected
    tree = json.loads((tmp_path / "config.json").read_text())
    quantization = {"kind": "int4", "group_size": 64, "double_quantization": False}
    assert tree["quantization"] == quantization
    for newer in ("quantization", "chat_template", "stop_ids", "generation"):
        del tree[newer]  # as earlier versions wrote
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert read_description(tmp_path) == MODEL


def test_files_are_plain_json(tmp_path):
    write_run(tmp_path, RUN)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert (tree["kind"], tree["version"], tree["bos"]) == ("llama_jax run", 1, True)
    assert tree["config"]["model"]["dim"] == 24
    write_description(tmp_path, MODEL)
    tree = json.loads((tmp_path / "config.json").read_text())
    keys = {"kind", "version", "model", "bos", "eos", "quantization", "chat_template"}
    assert tree.keys() == keys | {"stop_ids", "generation", "checksum"}
    assert (tree["kind"], tree["model"]["rope_scaling"]["kind"]) == ("llama_jax model", "none")


def test_edited_file_is_read_with_a_warning(tmp_path, capsys):
    write_description(tmp_path, MODEL)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # other spaces
    assert (read_description(tmp_path), capsys.readouterr().err) == (MODEL, "")
    path.write_text(path.read_text().replace('"eos": true', '"eos": false'))
    assert not read_description(tmp_path).eos
    assert capsys.readouterr().err.startswith(f"warning: {path} was edited or damaged")
    tree = json.loads(path.read_text())
    del tree["checksum"]
    path.write_text(json.dumps(tree))
    assert not read_description(tmp_path).eos
    assert capsys.readouterr().err.startswith(f"warning: {path} has no checksum")


def test_run_without_a_newer_field_is_read(tmp_path):
    write_run(tmp_path, RUN)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["config"]["model"]["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert read_run(tmp_path) == RUN


def changed(**changes):
    model = {"vocab_size": 53, "dim": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
    model |= {"context_length": 32}
    tree = {"kind": "llama_jax model", "version": 1, "bos": True, "eos": False, "model": model}
    return json.dumps(tree | changes)


DAMAGED = {
    "empty": "",
    "a list": "[]",
    "an empty mapping": "{}",
    "no UTF-8": "\xff",
    "deep": "[" * 100_000,
    "another version": '{"kind": "llama_jax run", "version": 2}',
    "another kind": changed(kind="llama_jax soup"),
    "no model": changed(model=None),
    "an unknown key": changed(model={"width": 3}),
    "a wrong size": changed(model={"vocab_size": -1}),
    "a run without a config": changed(kind="llama_jax run"),
    "stop ids that are none": changed(stop_ids=[-1]),
    "stop ids that are no list": changed(stop_ids=3),
    "an unknown sampling parameter": changed(generation={"warmth": 1}),
    "a sampling parameter that is no number": changed(generation={"temperature": float("nan")}),
    "sampling parameters that are no mapping": changed(generation=[1]),
}


def test_the_cases_below_differ_from_a_valid_file_by_one_change(tmp_path):
    (tmp_path / "config.json").write_text(changed())
    assert read_description(tmp_path).model.vocab_size == 53


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_one_line(tmp_path, damage):
    (tmp_path / "config.json").write_text(DAMAGED[damage], encoding="latin-1")
    for act in (read_run, read_description):
        assert "config.json is damaged" in error_of(act, tmp_path)


def test_other_files_and_folders_are_named(tmp_path):
    assert "missing does not exist" in error_of(read_run, tmp_path / "missing")
    assert "holds no run (it has no config.json)" in error_of(read_run, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "convert it with convert.py" in error_of(read_description, tmp_path)
    assert "describes no llama_jax run; choose another" in error_of(read_run, tmp_path)
    (tmp_path / "model.gguf").write_text("GGUF")
    assert "model.gguf is a file; make a" in error_of(read_description, tmp_path / "model.gguf")
