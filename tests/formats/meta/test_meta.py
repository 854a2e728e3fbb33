"""Meta's folders: split, merged and read back bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from meta_folders import MANY_HEADS, refused, rewrite, untied
from tiny_weights import same, tiny_vocabulary, tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats.meta import model as meta
from llama_jax.formats.torch import reader as torch_file
from llama_jax.formats.weights import DTYPES, Tensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, dtype):
    weights = untied(dtype)
    meta.write(weights, tmp_path / "out")
    again = meta.read(tmp_path / "out")
    same(again, weights)
    assert again.tokenizer == weights.tokenizer
    assert again.config.compute_dtype == ("float32" if dtype == "float32" else "bfloat16")
    assert again.config.ffn_dim == 40
    assert again.config.context_length == 32


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_are_merged_to_the_same_tensors(tmp_path, shards):
    weights = untied("bfloat16", **MANY_HEADS)
    reported = []
    meta.write(weights, tmp_path / "out", shards, reported.append)
    names = [f"consolidated.{number:02}.pth" for number in range(shards)]
    files = {*names, "params.json", "tokenizer.model"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    same(meta.read(tmp_path / "out"), weights)
    assert reported == sorted(reported)
    assert reported[-1] == sum(tensor.nbytes for tensor in weights.tensors.values())


def test_tensors_are_split_as_meta_splits_them(eight):
    whole = {name: tensor.read() for name, tensor in untied(**MANY_HEADS).tensors.items()}
    shards = [torch_file.read(eight / f"consolidated.{number:02}.pth") for number in range(8)]
    shapes = {
        "tok_embeddings.weight": (288, 12),
        "layers.1.attention.wq.weight": (12, 96),
        "layers.1.attention.wk.weight": (6, 96),
        "layers.1.attention.wv.weight": (6, 96),
        "layers.1.attention.wo.weight": (96, 12),
        "layers.1.feed_forward.w1.weight": (5, 96),
        "layers.1.feed_forward.w2.weight": (96, 5),
        "layers.1.feed_forward.w3.weight": (5, 96),
        "layers.1.attention_norm.weight": (96,),
        "layers.1.ffn_norm.weight": (96,),
        "norm.weight": (96,),
        "output.weight": (36, 96),
    }
    for name, shape in shapes.items():
        assert all(shard[name].shape == shape for shard in shards)
    last = {name: shards[7][name].read() for name in shapes}
    block = "blocks.1.attention"
    np.testing.assert_array_equal(last["tok_embeddings.weight"], whole["embedding"][:, 84:])
    np.testing.assert_array_equal(last["output.weight"], whole["output"][252:])
    np.testing.assert_array_equal(last["norm.weight"], whole["norm.scale"])
    values = whole[f"{block}.wv.kernel"][:, 7].T
    np.testing.assert_array_equal(last["layers.1.attention.wv.weight"], values)
    outputs = whole[f"{block}.wo.kernel"][14:].reshape(12, 96).T
    np.testing.assert_array_equal(last["layers.1.attention.wo.weight"], outputs)
    down = whole["blocks.1.ffn.down.kernel"][35:].T
    np.testing.assert_array_equal(last["layers.1.feed_forward.w2.weight"], down)
    gate = whole["blocks.1.ffn.gate.kernel"][:, 35:].T
    np.testing.assert_array_equal(last["layers.1.feed_forward.w1.weight"], gate)


def test_rotary_pairs_are_interleaved(folder):
    theirs = torch_file.read(folder / "consolidated.00.pth")["layers.2.attention.wk.weight"].read()
    ours = meta.read(folder).tensors["blocks.2.attention.wk.kernel"].read()
    for head in range(2):
        order = [4 * head + row for row in (0, 2, 1, 3)]
        np.testing.assert_array_equal(ours[:, head], theirs[order].T)


def test_tied_models_are_written_twice_and_read_untied(tmp_path):
    weights = tiny_weights(tied_embeddings=True)
    reported = []
    meta.write(weights, tmp_path / "out", report=reported.append)
    again = meta.read(tmp_path / "out")
    assert not again.config.tied_embeddings
    embedding = weights.tensors["embedding"].read()
    np.testing.assert_array_equal(again.tensors["output"].read(), embedding)
    np.testing.assert_array_equal(again.tensors["embedding"].read(), embedding)
    assert reported[-1] == sum(tensor.nbytes for tensor in weights.tensors.values())


def test_without_output_a_model_is_tied(folder):
    rewrite(folder / "consolidated.00.pth", lambda arrays: arrays.pop("output.weight"))
    again = meta.read(folder)
    assert again.config.tied_embeddings
    assert "output" not in again.tensors


def test_the_embedding_may_be_split_as_in_llama_3(eight):
    embedding = untied(**MANY_HEADS).tensors["embedding"].read()
    for number in range(8):
        part = {"tok_embeddings.weight": embedding[36 * number : 36 * (number + 1)]}
        rewrite(
            eight / f"consolidated.{number:02}.pth", lambda arrays, part=part: arrays.update(part)
        )
    same(meta.read(eight), untied(**MANY_HEADS))


def test_computed_tables_are_ignored(eight):
    tables = {"rope.freqs": np.ones(3, np.float32)}
    tables["layers.0.attention.mask"] = np.ones((1, 1, 4, 4), np.float64)
    tables["layers.2.attention.inner_attention.rope.freqs"] = np.ones(3, np.int64)
    for path in eight.glob("*.pth"):
        rewrite(path, lambda arrays: arrays.update(tables))
    same(meta.read(eight), untied(**MANY_HEADS))


def test_tensors_are_read_when_they_are_used(folder):
    path = folder / "consolidated.00.pth"
    content = path.read_bytes()
    scale = torch_file.read(path)["norm.weight"].read().tobytes()
    path.write_bytes(content.replace(scale, bytes(len(scale))))
    weights = meta.read(folder)
    with pytest.raises(UserError, match="is damaged in data/"):
        weights.tensors["norm.scale"].read()


def test_each_tensor_is_read_once(tmp_path):
    weights = untied(**MANY_HEADS)
    reads = []

    def counted(name, tensor):
        return Tensor(tensor.shape, tensor.dtype, lambda: (reads.append(name), tensor.read())[1])

    for name, tensor in weights.tensors.items():
        weights.tensors[name] = counted(name, tensor)
    meta.write(weights, tmp_path / "out", shards=8)
    assert sorted(reads) == sorted(weights.tensors)


@pytest.mark.parametrize(
    ("shards", "changes", "message"),
    [
        (0, {}, "shards=0"),
        (3, {}, "expected 1, 2, 4 or 8"),
        (16, {}, "shards=16"),
        (8, {"num_kv_heads": 4}, "num_kv_heads=4 does not divide into 8"),
        (2, {"vocab_size": 283}, "vocab_size=283"),
        (4, {"hidden_dim": 42}, "ffn_dim=42"),
    ],
)
def test_models_that_do_not_divide_are_refused(tmp_path, shards, changes, message):
    with pytest.raises(UserError, match=message):
        meta.write(untied(**MANY_HEADS | changes), tmp_path / "out", shards)
    assert not (tmp_path / "out").exists()


def test_demo_rand_params(shared_data):
    path = shared_data / "demo_rand_params.pth"
    weights = meta.read(path, tokenizer=shared_data / "tok512.model")
    config = weights.config
    assert (config.dim, config.num_layers, config.num_heads, config.num_kv_heads) == (64, 5, 8, 8)
    assert (config.ffn_dim, config.vocab_size, config.norm_eps) == (172, 512, 1e-5)
    assert not config.tied_embeddings
    assert weights.tokenizer == (shared_data / "tok512.model").read_bytes()
    for tensor in weights.tensors.values():
        array = tensor.read()
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    assert np.std(weights.tensors["blocks.4.ffn.down.kernel"].read()) > 0
    refused(path, "32,000", "512", "--tokenizer")


def test_the_tokenizer_is_found_beside_or_one_level_up(folder):
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    assert meta.read(folder).tokenizer == model
    (folder.parent / "tokenizer.model").rename(folder.parent / "other.model")
    assert meta.read(folder).tokenizer == b""
    assert meta.read(folder, tokenizer=folder.parent / "other.model").tokenizer == model


def test_the_current_folder_can_be_read(folder, monkeypatch):
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    monkeypatch.chdir(folder)
    assert meta.read(Path()).tokenizer == model


def test_tokenizers_that_do_not_fit_are_refused(folder):
    (folder / "tokenizer.model").write_bytes(tiny_vocabulary(290).to_model())
    refused(folder, "290", "283", "--tokenizer")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    refused(folder, "cut short", "2 pieces and 256 control tokens for 283 rows")
    refused(folder, "does not exist", tokenizer=folder / "absent.model")
