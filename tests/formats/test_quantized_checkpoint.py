"""Quantised checkpoints: equal to quantising on load, dequantised for other formats, misuse."""

import dataclasses
import functools
import gc
import json
import math
import shutil
import time
import weakref

import jax
import numpy as np
import pytest
import tensorstore
from cases import slow_but
from tiny_weights import tiny_weights

from llama_jax.checkpoints.load import load
from llama_jax.checkpoints.run_folder import claimed
from llama_jax.config import ModelConfig
from llama_jax.errors import UsageError, UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.formats.convert import Conversion, Options, convert
from llama_jax.formats.weights import Tensor
from llama_jax.llm import LLM
from llama_jax.model.parameters import named_leaves
from llama_jax.quantization import QuantizationConfig, model_nbytes, quantize

SIZES = {"dim": 128, "num_heads": 8, "hidden_dim": 192, "num_layers": 2, "context_length": 64}
SIZES |= {"attention_bias": True, "mlp_bias": True}
KINDS = {
    "int8": QuantizationConfig("int8"),
    "int4": QuantizationConfig("int4"),
    "int4-64": QuantizationConfig("int4", 64),
    "nf4": QuantizationConfig("nf4", double_quantization=True),
}


def weights(**changes):
    return tiny_weights(**SIZES | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one model as floats, and as each kind of integers that was asked for."""
    folder = tmp_path_factory.mktemp("quantized")
    checkpoint_folder.write(weights(), folder / "float")
    return folder


@pytest.fixture(scope="module")
def stored(place):
    """A function that returns the folder of the model as a kind of integers."""

    @functools.cache
    def folder_of(name):
        checkpoint_folder.write(weights(), place / name, quantization=KINDS[name])
        return place / name

    return folder_of


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A folder with a model of one layer in int8."""
    folder = tmp_path_factory.mktemp("one") / "c"
    checkpoint_folder.write(weights(num_layers=1), folder, quantization=KINDS["int8"])
    return folder


def same_leaves(found, expected):
    found, expected = named_leaves(found), named_leaves(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape), name
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("position", slow_but(["relative"], ["absolute", "relative"]))
def test_learned_positions_are_stored_as_floats(tmp_path, position):
    source = weights(position=position)
    checkpoint_folder.write(source, tmp_path / "float")
    checkpoint_folder.write(source, tmp_path / "int8", quantization=KINDS["int8"])
    model = load(tmp_path / "float").model
    same_leaves(load(tmp_path / "int8").model, quantize(model, "int8"))
    again = checkpoint_folder.read(tmp_path / "int8")
    assert again.config == source.config
    own = ("position_embedding", "blocks.1.attention.slopes")[position == "relative"]
    np.testing.assert_array_equal(again.tensors[own].read(), source.tensors[own].read())


@pytest.mark.parametrize("name", slow_but(["int8"], ["int8", "int4-64", "nf4"]))
def test_stored_matrices_equal_those_quantised_on_load(place, stored, name):
    quantization, found = KINDS[name], load(stored(name))
    floats = load(place / "float").model
    same_leaves(
        found.model,
        quantize(
            floats,
            quantization.kind,
            quantization.group_size,
            double_quantization=quantization.double_quantization,
        ),
    )
    most = {"int8": 0.3, "int4": 0.2, "nf4": 0.2}[quantization.kind]
    assert model_nbytes(found.model) < most * model_nbytes(floats)
    if name == "int8":  # an option that `load` takes
        same_leaves(found.model, load(place / "float", quantize=quantization.kind).model)
    assert load(stored(name), quantize=quantization.kind).config == found.config


@pytest.mark.slow
def test_both_write_the_same_tokens(place, stored):
    made = [
        llm.complete("abc", max_tokens=9, temperature=0)
        for llm in (LLM(stored("int8")), LLM(place / "float", quantize="int8"))
    ]
    assert made[0] == made[1] and len(set(made[0].token_ids)) > 2


@pytest.mark.slow
def test_half_precision_models_too(tmp_path):
    half = tiny_weights("bfloat16", tied_embeddings=False, compute_dtype="bfloat16", **SIZES)
    checkpoint_folder.write(half, tmp_path / "float")
    checkpoint_folder.write(half, tmp_path / "int8", quantization=KINDS["int8"])
    same_leaves(load(tmp_path / "int8").model, load(tmp_path / "float", quantize="int8").model)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("int8", 0.01),
        pytest.param("int4-64", 0.1, marks=pytest.mark.slow),
    ],
)
def test_floats_come_back_for_other_formats(stored, tmp_path, name, most):
    job = Conversion(source="ckpt", input=stored(name), target="ckpt", output=tmp_path / "float")
    assert convert(job).is_rounded
    read, expected = checkpoint_folder.read(tmp_path / "float"), weights().tensors
    assert not read.is_rounded and read.tensors.keys() == expected.keys()
    for tensor, right in ((read.tensors[name].read(), expected[name].read()) for name in expected):
        assert (tensor.shape, tensor.dtype) == (right.shape, np.float32)
        assert np.linalg.norm(tensor - right) <= most * np.linalg.norm(right)
    logits = jax.jit(lambda model: model(np.array([[1, 5, 7]]))[0])
    np.testing.assert_allclose(
        logits(load(tmp_path / "float").model), logits(load(stored(name)).model), atol=2e-4
    )


def test_one_float_matrix_is_held_at_a_time(tmp_path):
    alive, read = [], []

    def watched(name, tensor):
        def look():
            for _ in range(200):  # a computation still under way may hold the last one a moment
                if not any(array() is not None for array in alive):
                    break
                gc.collect()
                time.sleep(0.05)
            assert not [array for array in alive if array() is not None], name
            read.append(name)
            array = tensor.read().copy()
            alive.append(weakref.ref(array))
            return array

        return Tensor(tensor.shape, tensor.dtype, look)

    whole = weights()
    tensors = {name: watched(name, tensor) for name, tensor in whole.tensors.items()}
    whole = dataclasses.replace(whole, tensors=tensors)
    checkpoint_folder.write(whole, tmp_path / "out", quantization=KINDS["int4"])
    assert sorted(read) == sorted(whole.tensors)


def error_line(error, act, *arguments, **options):
    with pytest.raises(error) as caught:
        act(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_kind_than_that_stored_is_refused(stored):
    line = error_line(UsageError, LLM, stored("int8"), quantize="int4")
    assert "quantize='int4' does not fit" in line and "is stored as int8" in line
    assert "quantize='int2' is unknown" in error_line(
        UsageError, load, stored("int8"), quantize="int2"
    )


def test_quantised_checkpoints_are_not_quantised_again_or_trained(stored, tmp_path):
    options = Options(quantization=KINDS["int4"])
    job = Conversion(
        source="ckpt", input=stored("int8"), target="ckpt", output=tmp_path / "x", options=options
    )
    assert "is quantised already" in error_line(UserError, convert, job)

    def train():
        with claimed(stored("int8")):
            pass

    assert "holds a converted model, not a run" in error_line(UserError, train)


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("gguf", {"quantization": KINDS["int8"]}, "quantize is for checkpoints alone"),
        ("ckpt", {"quantization": KINDS["int8"], "dtype": "float32"}, "does not go with quantize"),
    ],
)
def test_incompatible_options_are_refused(place, tmp_path, target, options, says):
    make = {"source": "ckpt", "input": place / "float", "output": tmp_path / "x"}
    assert says in error_line(
        UsageError, Conversion, target=target, options=Options(**options), **make
    )


def edit(folder, change):
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


def as_floats(folder):
    """Say that a kernel of integers is one of floats."""
    base = {"driver": "file", "path": f"{folder}/0/model/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    name = "blocks.0.ffn.up.kernel/.zarray"
    tree = json.loads(store[name])
    bytes_ = math.prod(tree["shape"]) // 4
    store[name] = json.dumps(tree | {"dtype": "<f4", "shape": [bytes_], "chunks": [bytes_]})


DAMAGE = {
    "another kind": lambda folder: edit(folder, lambda t: t["quantization"].update(kind="int4")),
    "no kind": lambda folder: edit(folder, lambda t: t["quantization"].update(kind="int2")),
    "a text": lambda folder: edit(folder, lambda t: t.update(quantization="int8")),
    "unsaid": lambda folder: edit(folder, lambda t: t.update(quantization=None)),
    "many layers": lambda folder: edit(folder, lambda t: t["model"].update(num_layers=500)),
    "absurd": lambda folder: edit(folder, lambda t: t["model"].update(num_layers=10**12)),
    "a template that is none": lambda folder: edit(folder, lambda t: t.update(chat_template=3)),
    "floats": as_floats,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", [load, checkpoint_folder.read])
def test_damage_is_reported_in_one_line(one_layer, tmp_path, reader, damage):
    shutil.copytree(one_layer, tmp_path / "c")
    DAMAGE[damage](tmp_path / "c")
    assert str(tmp_path / "c") in error_line(UserError, reader, tmp_path / "c")


@pytest.mark.slow
def test_defaults_of_a_config_are_used(tmp_path):
    """Widths by the rule, and inputs that are no multiple of a group."""
    config = {"hidden_dim": 0, "multiple_of": 8, "dim": 24, "num_heads": 6}
    small = weights(**config)
    checkpoint_folder.write(small, tmp_path / "c", quantization=KINDS["int4"])
    assert load(tmp_path / "c").config == ModelConfig(**vars(small.config))
    assert checkpoint_folder.read(tmp_path / "c").config == small.config
