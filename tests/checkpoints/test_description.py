"""What a folder says it holds: a run or a converted model, and nothing that was not meant."""

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


def told(act, folder):
    with pytest.raises(UserError) as error:
        act(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_is_described(tmp_path):
    write_run(tmp_path, RUN)
    assert read_run(tmp_path) == RUN
    expected = Description(model=RUN.config.model, bos=True, eos=False)
    assert read_description(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_model_is_described_and_is_no_run(tmp_path):
    write_description(tmp_path, MODEL)
    assert read_description(tmp_path) == MODEL
    assert "holds a converted model, not a run; choose" in told(read_run, tmp_path)


def test_a_model_tells_its_quantisation_and_template(tmp_path):
    int4 = QuantizationConfig("int4", 64)
    told = dataclasses.replace(MODEL, quantization=int4, chat_template="alpaca")
    write_description(tmp_path, told)
    assert read_description(tmp_path) == told
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["quantization"] == {"kind": "int4", "group_size": 64}
    del tree["quantization"], tree["chat_template"]  # as earlier versions wrote
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert read_description(tmp_path) == MODEL


def test_descriptions_are_plain_json(tmp_path):
    write_run(tmp_path, RUN)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert (tree["kind"], tree["version"], tree["bos"]) == ("llama_jax run", 1, True)
    assert tree["config"]["model"]["dim"] == 24
    write_description(tmp_path, MODEL)
    tree = json.loads((tmp_path / "config.json").read_text())
    told = {"kind", "version", "model", "bos", "eos", "quantization", "chat_template"}
    assert tree.keys() == told
    assert (tree["kind"], tree["model"]["rope_scaling"]["kind"]) == ("llama_jax model", "none")


def test_a_run_from_before_some_field_existed_is_read(tmp_path):
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
}


def test_the_damaged_ones_are_damaged_by_one_change(tmp_path):
    (tmp_path / "config.json").write_text(changed())
    assert read_description(tmp_path).model.vocab_size == 53


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_description_is_told_in_one_line(tmp_path, damage):
    (tmp_path / "config.json").write_text(DAMAGED[damage], encoding="latin-1")
    for act in (read_run, read_description):
        assert "config.json is damaged" in told(act, tmp_path)


def test_what_holds_nothing_of_ours_is_named(tmp_path):
    assert "missing does not exist" in told(read_run, tmp_path / "missing")
    assert "holds no run (it has no config.json)" in told(read_run, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "convert it with convert.py" in told(read_description, tmp_path)
    assert "describes no llama_jax run; choose another" in told(read_run, tmp_path)
    (tmp_path / "model.gguf").write_text("GGUF")
    assert "model.gguf is a file; make a" in told(read_description, tmp_path / "model.gguf")
