import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import SIZES, same, tiny_vocabulary, tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats.convert import format_of
from llama_jax.formats.huggingface import model as hugging_face
from llama_jax.formats.huggingface import safetensors as safetensors_file
from llama_jax.formats.huggingface.model import EMBEDDING, OUTPUT
from llama_jax.formats.weights import Tensor, Weights

D, N, H, F, V = 24, 6, 4, 40, SIZES["vocab_size"]


def stored(folder):
    """The folder's tensors by their names, in memory."""
    return {n: t.read() for n, t in safetensors_file.read(folder / "model.safetensors").items()}


def store(folder, arrays):
    """Other tensors for a folder."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    lazy_tensors = {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
    safetensors_file.write(folder / "model.safetensors", lazy_tensors)


def say(folder, **changes):
    """Other keys for a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    hugging_face.write(tiny_weights(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def untied(tmp_path):
    hugging_face.write(tiny_weights(tied_embeddings=False), tmp_path / "untied")
    return tmp_path / "untied"


def refused(folder, *reasons, **options):
    with pytest.raises(UserError) as caught:
        hugging_face.read(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(reason in message for reason in reasons), message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", [5e9, 9e3])
def test_what_is_written_is_read_bit_for_bit(dtype, shard, tmp_path):
    scaling = RopeScaling(kind="llama3", factor=8.0, original_context=16)
    weights = tiny_weights(
        dtype,
        tied_embeddings=shard > 1e6,
        rope_scaling=scaling,
        rope_theta=5e5,
        norm_eps=1e-6,
        compute_dtype="float32" if dtype == "float32" else "bfloat16",
    )
    hugging_face.write(weights, tmp_path / "model", max_shard_bytes=shard)
    back = hugging_face.read(tmp_path / "model")
    same(back, weights)
    assert (back.config, back.tokenizer, back.bos) == (weights.config, weights.tokenizer, True)
    is_single = len(list((tmp_path / "model").glob("*.safetensors"))) == 1
    assert is_single == (shard > 1e6)


def test_norms_may_be_wider_than_matrices(tmp_path):
    weights, wide = tiny_weights("bfloat16"), tiny_weights("float32")
    mixed = weights.tensors | {n: t for n, t in wide.tensors.items() if "norm" in n}
    weights = dataclasses.replace(weights, tensors=mixed)
    hugging_face.write(weights, tmp_path / "model")
    back = hugging_face.read(tmp_path / "model")
    same(back, weights)
    assert back.config.compute_dtype == "bfloat16"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tensors_have_the_layout_of_transformers(untied):
    weights, theirs = tiny_weights(tied_embeddings=False), stored(untied)
    ours = {name: tensor.read() for name, tensor in weights.tensors.items()}
    layer = "model.layers.1."
    expected = {
        EMBEDDING: ours["embedding"],
        OUTPUT: ours["output"],
        "model.norm.weight": ours["norm.scale"],
        layer + "input_layernorm.weight": ours["blocks.1.attention_norm.scale"],
        layer + "post_attention_layernorm.weight": ours["blocks.1.ffn_norm.scale"],
        layer + "self_attn.o_proj.weight": ours["blocks.1.attention.wo.kernel"].reshape(D, D).T,
        layer + "mlp.down_proj.weight": ours["blocks.1.ffn.down.kernel"].T,
        layer + "mlp.gate_proj.weight": ours["blocks.1.ffn.gate.kernel"].T,
        layer + "mlp.up_proj.weight": ours["blocks.1.ffn.up.kernel"].T,
    }
    for letter in "qkv":
        kernel = ours[f"blocks.1.attention.w{letter}.kernel"]
        expected[f"{layer}self_attn.{letter}_proj.weight"] = kernel.reshape(D, -1).T
    assert len(theirs) == 3 + 9 * 3
    for name, array in expected.items():
        assert theirs[name].shape == array.shape and (theirs[name] == array).all(), name
    assert theirs[layer + "self_attn.k_proj.weight"].shape == (2 * H, D)
    assert theirs[layer + "mlp.down_proj.weight"].shape == (D, F)


def test_each_tensor_is_read_once_kind_by_kind(tmp_path):
    weights, log, done = tiny_weights(tied_embeddings=False), [], []

    def logged(name, tensor):
        return dataclasses.replace(tensor, read=lambda: (log.append(name), tensor.read())[1])

    lazy_tensors = {name: logged(name, tensor) for name, tensor in weights.tensors.items()}
    hugging_face.write(
        dataclasses.replace(weights, tensors=lazy_tensors), tmp_path / "model", report=done.append
    )
    assert sorted(log) == sorted(lazy_tensors)
    layers = [name for name in log if ".wq." in name]
    assert layers == [f"blocks.{i}.attention.wq.kernel" for i in range(3)]
    assert log.index(layers[-1]) - log.index(layers[0]) == 2
    assert done == sorted(done) and done[-1] == sum(t.nbytes for t in lazy_tensors.values())


def test_tensors_are_read_lazily(folder, monkeypatch):
    monkeypatch.setattr(np, "memmap", None)
    weights = hugging_face.read(folder)
    with pytest.raises(TypeError):
        weights.tensors["embedding"].read()


def test_the_files_of_a_folder(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert ids.items() <= config.items()
    assert json.loads((folder / "generation_config.json").read_text()) == ids


@pytest.mark.parametrize("stored_as", [EMBEDDING, OUTPUT])
def test_a_tied_model_may_store_its_table_under_either_name(stored_as, folder):
    arrays = stored(folder)
    table = arrays.pop(EMBEDDING)
    store(folder, arrays | {stored_as: table})
    same(hugging_face.read(folder), tiny_weights())


def test_a_tied_model_may_store_its_table_twice_if_it_is_the_same(folder):
    arrays = stored(folder)
    store(folder, arrays | {OUTPUT: arrays[EMBEDDING]})
    same(hugging_face.read(folder), tiny_weights())
    changed = arrays[EMBEDDING].copy()
    changed[-1, -1] += 1
    store(folder, arrays | {OUTPUT: changed})
    refused(folder, "tie_word_embeddings", "differ")
    store(folder, arrays | {OUTPUT: arrays[EMBEDDING][:-1]})
    refused(folder, "differ")
    store(folder, arrays | {OUTPUT: arrays[EMBEDDING].astype(np.float16)})
    refused(folder, "differ")


def test_an_untied_model_needs_its_output(untied):
    arrays = stored(untied)
    store(untied, {name: array for name, array in arrays.items() if name != OUTPUT})
    refused(untied, "lm_head.weight is missing")


def test_all_tensors_that_do_not_fit_are_named(folder):
    arrays = stored(folder)
    del arrays["model.norm.weight"]
    arrays["model.layers.0.mlp.up_proj.bias"] = np.zeros(3, np.float32)
    name = "model.layers.2.self_attn.k_proj.weight"
    arrays[name] = arrays[name].T.copy()
    store(folder, arrays)
    refused(folder, "model.norm.weight is missing", "up_proj.bias is unknown", f"{name} is [24, 8]")


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_rotary_tables_in_old_files_are_ignored(dtype, folder):
    names = [f"layers.0.self_attn.rotary_emb.{name}" for name in ("inv_freq", "cos_cached")]
    names += ["model.layers.1.self_attn.rotary_emb.sin_cached", "rotary_emb.inv_freq"]
    store(folder, stored(folder) | {name: np.ones(2, dtype) for name in names})
    same(hugging_face.read(folder), tiny_weights())


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.", "layers._orig_mod."),
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
    ],
)
def test_prefixes_of_names_do_not_matter(renamed, untied):
    store(untied, {renamed(name): array for name, array in stored(untied).items()})
    same(hugging_face.read(untied), tiny_weights(tied_embeddings=False))


def test_a_tensor_under_two_prefixes_is_refused(folder):
    arrays = stored(folder)
    store(folder, arrays | {f"module.{EMBEDDING}": arrays[EMBEDDING]})
    refused(folder, f"{EMBEDDING} twice")


def test_a_folder_of_an_adapter_says_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "holds an adapter", "--merge --base", "--from peft")
    assert format_of(tmp_path) == "peft"


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float64])
def test_other_dtypes_are_refused(dtype, folder):
    arrays = stored(folder)
    store(folder, arrays | {EMBEDDING: arrays[EMBEDDING].astype(dtype)})
    refused(folder, f"embedding as {np.dtype(dtype)}", "float32, float16, bfloat16")


def test_a_folder_without_config_is_refused(folder, tmp_path):
    refused(tmp_path, "has no config.json")
    refused(tmp_path / "absent", "has no config.json")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "llama"}')
    refused(folder, "'model_type' occurs twice")
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**27)
    refused(folder, "has 134,217,728 bytes")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"hidden_size": 48, "head_dim": 8},
        {"num_attention_heads": 4, "head_dim": 6},
        {"head_dim": 8},
        {"num_key_value_heads": 3},
        {"intermediate_size": 41},
        {"vocab_size": 284},
        {"tie_word_embeddings": False},
    ],
)
def test_a_config_of_another_shape_is_refused(changes, folder):
    say(folder, **changes)
    refused(folder, "does not hold this Llama's tensors")


def test_a_config_of_other_numbers_is_followed(folder):
    say(folder, rms_norm_eps=1e-6, rope_theta=5e5)
    config = hugging_face.read(folder).config
    assert (config.norm_eps, config.rope_theta) == (1e-6, 5e5)


def test_a_model_without_tokenizer_is_read_and_written(tmp_path):
    weights = dataclasses.replace(tiny_weights(), tokenizer=b"")
    hugging_face.write(weights, tmp_path / "model")
    back = hugging_face.read(tmp_path / "model")
    same(back, weights)
    assert back.tokenizer == b""
    model = tiny_vocabulary().to_model()
    (tmp_path / "own.model").write_bytes(model)
    assert hugging_face.read(tmp_path / "model", tmp_path / "own.model").tokenizer == model


@pytest.mark.parametrize("bos", [True, False])
def test_add_bos_token_comes_back(bos, tmp_path):
    hugging_face.write(dataclasses.replace(tiny_weights(), bos=bos), tmp_path / "model")
    assert hugging_face.read(tmp_path / "model").bos is bos


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError):
        hugging_face.write(tiny_weights(), tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 3500), st.integers(0, 255))
def test_a_changed_header_is_refused_or_gives_a_whole_model(tmp_path_factory, place, byte):
    folder = tmp_path_factory.getbasetemp() / "changed_model"
    if not folder.exists():
        hugging_face.write(tiny_weights(), folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    place = min(place, 7 + int.from_bytes(data[:8], "little"))
    path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
    try:
        weights = hugging_face.read(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(weights, Weights)
        for tensor in weights.tensors.values():
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    finally:
        path.write_bytes(data)
