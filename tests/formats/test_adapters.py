"""Folders of adapters: PEFT's there and back, merged on the way to other formats, and refused."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
from cases import slow_but
from tiny_weights import SIZES, built, same, tiny_weights

from llama_jax.checkpoints.load import load, read_fingerprint
from llama_jax.config import LoraConfig
from llama_jax.errors import UserError
from llama_jax.formats import adapters, checkpoint
from llama_jax.formats.convert import FORMATS, Conversion, Options, convert, read_source
from llama_jax.formats.huggingface import safetensors
from llama_jax.formats.weights import DTYPES, Tensor
from llama_jax.model.lora import init_adapters, merge
from llama_jax.quantization import QuantizationConfig

TOKENS_BT = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 9))
LORA = LoraConfig(rank=3, alpha=7.0, targets="linear,output", rslora=True)


@pytest.fixture(scope="module")
def weights():
    return tiny_weights(tied_embeddings=False)


@pytest.fixture(scope="module")
def base(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "ckpt"
    checkpoint.write(weights, folder)
    return folder


@pytest.fixture(scope="module")
def made(weights):
    """Random adapters."""
    start = init_adapters(weights.config, LORA, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), start)


@pytest.fixture
def folder(weights, base, made, tmp_path):
    """A folder of ours with them."""
    description = checkpoint.read_description(base)
    description = dataclasses.replace(description, lora=LORA, base=str(base))
    path = tmp_path / "ours"
    fingerprint = read_fingerprint(base)
    checkpoint.write_adapters(path, description, made, fingerprint, weights.tokenizer)
    return path


@jax.jit
def logits(model):
    return model(TOKENS_BT)[0]


def test_to_peft_and_back_is_the_same(folder, base, made, tmp_path):
    adapters.write_peft(folder, tmp_path / "peft")
    adapters.from_peft(tmp_path / "peft", base, tmp_path / "back")
    back = adapters.read(tmp_path / "back")
    assert back.lora.targets == "down,gate,output,up,wk,wo,wq,wv"
    assert (back.lora.rank, back.lora.alpha, back.lora.rslora) == (3, 7.0, True)
    for name, adapter in made.items():
        for part, array in adapter.items():
            np.testing.assert_array_equal(back.adapters[name][part][...], array[...])


def test_names_and_shapes_are_those_of_peft(folder, tmp_path):
    adapters.write_peft(folder, tmp_path / "peft")
    stored = safetensors.read(tmp_path / "peft" / "adapter_model.safetensors")
    prefix = "base_model.model."
    layer = f"{prefix}model.layers.2."
    assert stored[f"{layer}self_attn.k_proj.lora_A.weight"].shape == (3, 24)
    assert stored[f"{layer}self_attn.k_proj.lora_B.weight"].shape == (8, 3)
    assert stored[f"{layer}self_attn.o_proj.lora_A.weight"].shape == (3, 24)
    assert stored[f"{layer}mlp.down_proj.lora_A.weight"].shape == (3, 40)
    assert stored[f"{prefix}lm_head.lora_B.weight"].shape == (SIZES["vocab_size"], 3)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["r"] == 3 and settings["lora_alpha"] == 7.0 and settings["use_rslora"]
    assert settings["target_modules"][0] == "down_proj" and "lm_head" in settings["target_modules"]


def test_peft_has_no_adapters_of_models_without_rotary_embeddings(tmp_path):
    weights, lora = tiny_weights(position="alibi"), LoraConfig(rank=2, targets="wq")
    checkpoint.write(weights, tmp_path / "base")
    description = checkpoint.read_description(tmp_path / "base")
    description = dataclasses.replace(description, lora=lora, base=str(tmp_path / "base"))
    made = init_adapters(weights.config, lora, jax.random.key(0))
    checkpoint.write_adapters(tmp_path / "ours", description, made, "", weights.tokenizer)
    with pytest.raises(UserError, match=r"model with model.position='alibi', and the Llama of"):
        adapters.write_peft(tmp_path / "ours", tmp_path / "peft")


@pytest.mark.parametrize("target", slow_but(["hf"], ["ckpt", "hf", "gguf"]))
def test_merged_on_the_way_is_merged_in_memory(weights, folder, base, made, tmp_path, target):
    output = tmp_path / ("out.gguf" if target == "gguf" else "out")
    convert(Conversion(source="ckpt", input=base, adapter=folder, target=target, output=output))
    expected = logits(merge(built(weights), made, LORA))
    found = logits(built(FORMATS[target].read(output)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(logits(load(folder).model), expected, atol=1e-4)


def test_sums_are_rounded_once_to_the_dtype_that_is_asked_for(tmp_path):
    half = tiny_weights(dtype="bfloat16")
    base, path, lora = tmp_path / "base", tmp_path / "ours", LoraConfig(rank=2, targets="wq")
    checkpoint.write(half, base)
    start = init_adapters(half.config, lora, jax.random.key(0))
    made = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(2), x.shape), start)
    description = dataclasses.replace(checkpoint.read_description(base), lora=lora, base=str(base))
    fingerprint = read_fingerprint(base)
    checkpoint.write_adapters(path, description, made, fingerprint, half.tokenizer)
    name, found = "blocks.1.attention.wq.kernel", {}
    for dtype in ("", "float32"):
        output = tmp_path / f"out{dtype}"
        options = Options(dtype=dtype)
        job = Conversion(
            source="ckpt", input=base, adapter=path, target="ckpt", output=output, options=options
        )
        convert(job)
        found[dtype] = checkpoint.read(output).tensors[name].read()
    expected = merge(built(half), made, lora).blocks.attention.wq.kernel[1]
    assert found["float32"].dtype == np.float32 and found[""].dtype == DTYPES["bfloat16"]
    np.testing.assert_allclose(found["float32"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[""], found["float32"].astype(DTYPES["bfloat16"]))


def test_nothing_learned_is_the_base(weights, base, made, tmp_path):
    zero = jax.tree.map(lambda x: 0 * x, made)
    description = dataclasses.replace(checkpoint.read_description(base), lora=LORA, base=str(base))
    fingerprint = read_fingerprint(base)
    checkpoint.write_adapters(tmp_path / "zero", description, zero, fingerprint, weights.tokenizer)
    job = Conversion(
        source="ckpt", input=base, adapter=tmp_path / "zero", target="hf", output=tmp_path / "x"
    )
    same(read_source(job), weights)


def test_a_quantized_base_is_refused_with_the_way_to_do_it(weights, folder, tmp_path):
    small = tmp_path / "small"
    checkpoint.write(weights, small, quantization=QuantizationConfig("int8"))
    job = Conversion(source="ckpt", input=small, adapter=folder, target="hf", output=tmp_path / "x")
    with pytest.raises(UserError, match=r"is quantized, .* name the model .* with --base"):
        read_source(job)


def test_another_base_is_refused(folder, tmp_path):
    checkpoint.write(tiny_weights(seed=5, tied_embeddings=False), tmp_path / "other")
    job = Conversion(
        source="ckpt",
        input=tmp_path / "other",
        adapter=folder,
        target="hf",
        output=tmp_path / "x",
    )
    with pytest.raises(UserError, match="were trained for another model than"):
        read_source(job)


def test_adapters_of_a_tied_embedding_are_not_for_peft(tmp_path):
    weights, lora = tiny_weights(), LoraConfig(rank=2, targets="embedding")
    checkpoint.write(weights, tmp_path / "base")
    description = dataclasses.replace(
        checkpoint.read_description(tmp_path / "base"), lora=lora, base="base"
    )
    made = init_adapters(weights.config, lora, jax.random.key(0))
    checkpoint.write_adapters(tmp_path / "ours", description, made, "", weights.tokenizer)
    with pytest.raises(UserError, match="PEFT cannot express; use --merge"):
        adapters.write_peft(tmp_path / "ours", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


BROKEN = {
    "dora": ({"use_dora": True}, "use_dora=True is not supported"),
    "biases": ({"bias": "all"}, "bias='all' is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "other kind": ({"peft_type": "IA3"}, "peft_type='IA3'; expected LORA"),
    "no rank": ({"r": 0}, "r=0 and lora_alpha=7.0; expected numbers"),
    "rank is text": ({"r": "8"}, "r='8'"),
    "another rank": ({"r": 4}, "it belongs to another model"),
    "alpha out of range": ({"lora_alpha": -1}, "adapter_config.json: lora.alpha=-1.0"),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "adapter_config.json: int too large"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_not_understood_is_refused_in_one_line(folder, base, tmp_path, kind):
    changes, reason = BROKEN[kind]
    adapters.write_peft(folder, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        adapters.from_peft(tmp_path / "peft", base, tmp_path / "x")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_base_that_is_an_adapter_is_refused(folder, tmp_path):
    adapters.write_peft(folder, tmp_path / "peft")
    with pytest.raises(UserError, match="holds adapters; name the model that they belong to"):
        adapters.from_peft(tmp_path / "peft", folder, tmp_path / "back")
    for base, wrong in ((folder, "holds adapters itself"), (tmp_path / "no", "does not exist")):
        with pytest.raises(UserError, match=f"{wrong}; name the model with --base"):
            load(folder, base=str(base))


def test_missing_and_unknown_arrays_are_named(folder, base, tmp_path):
    adapters.write_peft(folder, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    arrays = {name: np.array(tensor.read()) for name, tensor in safetensors.read(path).items()}
    tensors = {name: Tensor(x.shape, x.dtype, partial(np.copy, x)) for name, x in arrays.items()}
    layer = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight".format
    dropped = {name: tensor for name, tensor in tensors.items() if name != layer(1)}
    odd = tensors | {layer(9): tensors[layer(1)]}
    turned = arrays[layer(1)].T
    turned = tensors | {layer(1): Tensor(turned.shape, turned.dtype, partial(np.copy, turned))}
    for broken, reason in (
        (dropped, "not both matrices"),
        (odd, "which is no adapter"),
        (turned, r"has \[3, 24\] for blocks.ffn.up, expected \[24, 3\]"),
        ({}, "lora.targets"),
    ):
        path.unlink()
        safetensors.write(path, broken)
        with pytest.raises(UserError, match=reason):
            adapters.from_peft(tmp_path / "peft", base, tmp_path / "x")
    path.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        adapters.from_peft(tmp_path / "peft", base, tmp_path / "x")
