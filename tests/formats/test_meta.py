"""Meta's folders: cut, merged, read back bit for bit, and refused in one line when they lie."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import same, tiny_vocabulary, tiny_weights

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats import meta, meta_params, torch_file, torch_writer
from llama_jax.formats.weights import DTYPES, Tensor

MANY_HEADS = {"dim": 96, "num_heads": 16, "num_kv_heads": 8, "vocab_size": 288}


def untied(dtype="float32", **changes):
    return tiny_weights(dtype, tied_embeddings=False, **changes)


def promised(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def rewrite(path, change):
    """Write a .pth anew, its arrays changed by a function of the dict of them."""
    arrays = {name: tensor.read().copy() for name, tensor in torch_file.read(path).items()}
    change(arrays)
    path.unlink()
    torch_writer.write(path, {name: promised(array) for name, array in arrays.items()})


def set_params(folder, remove=(), **changes):
    path = folder / "params.json"
    params = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: params[name] for name in params if name not in remove}))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of one shard, not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    meta.write(untied("bfloat16"), folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def eight(tmp_path):
    """A folder of eight shards."""
    meta.write(untied(**MANY_HEADS), tmp_path / "eight", shards=8)
    return tmp_path / "eight"


def refused(path, *words, **arguments):
    with pytest.raises(UserError) as caught:
        meta.read(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# Whole models


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
    told = []
    meta.write(weights, tmp_path / "out", shards, told.append)
    names = [f"consolidated.{number:02}.pth" for number in range(shards)]
    files = {*names, "params.json", "tokenizer.model"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    same(meta.read(tmp_path / "out"), weights)
    assert told == sorted(told)
    assert told[-1] == sum(tensor.nbytes for tensor in weights.tensors.values())


def test_shards_are_cut_as_meta_cuts_them(eight):
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


def test_meta_turns_neighbours_and_we_halves(folder):
    theirs = torch_file.read(folder / "consolidated.00.pth")["layers.2.attention.wk.weight"].read()
    ours = meta.read(folder).tensors["blocks.2.attention.wk.kernel"].read()
    for head in range(2):
        order = [4 * head + row for row in (0, 2, 1, 3)]
        np.testing.assert_array_equal(ours[:, head], theirs[order].T)


def test_tied_models_are_written_twice_and_read_untied(tmp_path):
    weights = tiny_weights(tied_embeddings=True)
    told = []
    meta.write(weights, tmp_path / "out", report=told.append)
    again = meta.read(tmp_path / "out")
    assert not again.config.tied_embeddings
    embedding = weights.tensors["embedding"].read()
    np.testing.assert_array_equal(again.tensors["output"].read(), embedding)
    np.testing.assert_array_equal(again.tensors["embedding"].read(), embedding)
    assert told[-1] == sum(tensor.nbytes for tensor in weights.tensors.values())


def test_without_output_a_model_is_tied(folder):
    rewrite(folder / "consolidated.00.pth", lambda arrays: arrays.pop("output.weight"))
    again = meta.read(folder)
    assert again.config.tied_embeddings
    assert "output" not in again.tensors


def test_the_embedding_may_be_cut_as_llama_3_cuts_it(eight):
    embedding = untied(**MANY_HEADS).tensors["embedding"].read()
    for number in range(8):
        part = {"tok_embeddings.weight": embedding[36 * number : 36 * (number + 1)]}
        rewrite(
            eight / f"consolidated.{number:02}.pth", lambda arrays, part=part: arrays.update(part)
        )
    same(meta.read(eight), untied(**MANY_HEADS))


def test_tables_that_everybody_computes_are_ignored(eight):
    tables = {"rope.freqs": np.ones(3, np.float32)}
    tables["layers.0.attention.mask"] = np.ones((1, 1, 4, 4), np.float64)
    tables["layers.2.attention.inner_attention.rope.freqs"] = np.ones(3, np.int64)
    for path in eight.glob("*.pth"):
        rewrite(path, lambda arrays: arrays.update(tables))
    same(meta.read(eight), untied(**MANY_HEADS))


def test_nothing_is_read_before_it_is_asked_for(good, monkeypatch):
    def read(self, view):
        raise AssertionError("read too early")

    monkeypatch.setattr(torch_file._Storage, "read", read)
    weights = meta.read(good)
    with pytest.raises(AssertionError, match="too early"):
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


# A genuine file


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


# Params


def configured(folder, remove=(), **changes):
    set_params(folder, remove, **changes)
    return meta.read(folder).config


def test_optional_params_may_be_missing_or_null(folder):
    rewrite(folder / "consolidated.00.pth", kv_heads_as_many_as_heads)
    bare = configured(
        folder, ("n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "max_seq_len")
    )
    assert (bare.num_kv_heads, bare.vocab_size, bare.norm_eps) == (6, 283, 1e-5)
    assert (bare.rope_theta, bare.hidden_dim, bare.context_length) == (10000.0, 40, 4096)
    nulls = configured(folder, n_kv_heads=None, vocab_size=-1, rope_theta=None, max_batch_size=4)
    assert nulls == bare


def kv_heads_as_many_as_heads(arrays):
    for layer in range(3):
        for name in ("wk", "wv"):
            arrays[f"layers.{layer}.attention.{name}.weight"] = arrays[
                f"layers.{layer}.attention.wq.weight"
            ]


@pytest.mark.parametrize(
    ("params", "context"),
    [
        ({"norm_eps": 1e-5}, 4096),
        ({"norm_eps": 1e-6}, 2048),
        ({"rope_theta": 1e6}, 16384),
        ({"rope_theta": 500000}, 8192),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072),
        ({"max_seq_len": 77, "rope_theta": 1e6}, 77),
    ],
)
def test_the_context_length_is_that_of_the_kind_of_model(folder, params, context):
    set_params(folder, ["max_seq_len"])
    assert configured(folder, **params).context_length == context


def test_scaled_rope_is_that_of_llama_3(folder):
    scaling = configured(folder, use_scaled_rope=True).rope_scaling
    assert scaling == RopeScaling(
        kind="llama3",
        factor=8.0,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_context=8192,
    )
    assert configured(folder, use_scaled_rope=False).rope_scaling.kind == "none"


def test_the_width_is_that_of_the_tensors_and_the_rule_is_kept_where_it_gives_it(folder):
    by_rule = configured(folder, ["ffn_dim_multiplier"], multiple_of=1)
    assert (by_rule.hidden_dim, by_rule.ffn_dim) == (40, 40)  # the rule would give 64
    config = configured(folder, multiple_of=20, ffn_dim_multiplier=0.5)
    assert (config.hidden_dim, config.ffn_dim, config.multiple_of) == (0, 40, 20)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Meta's own 7B, 13B and 70B, and TinyLlama's
        (
            {"dim": 4096, "hidden_dim": 11008, "num_heads": 32, "num_kv_heads": 32},
            (256, None),
        ),
        (
            {"dim": 5120, "hidden_dim": 13824, "num_heads": 40, "num_kv_heads": 40},
            (256, None),
        ),
        ({"dim": 8192, "hidden_dim": 28672, "num_heads": 64, "num_kv_heads": 8}, (4096, 1.3)),
        ({"dim": 2048, "hidden_dim": 5632, "num_heads": 32, "num_kv_heads": 4}, (256, None)),
        ({"dim": 14, "hidden_dim": 40, "num_heads": 1, "num_kv_heads": 1}, (8, None)),
        ({"dim": 26, "hidden_dim": 23, "num_heads": 1, "num_kv_heads": 1}, None),
        ({"dim": 24, "hidden_dim": 41, "num_heads": 6, "num_kv_heads": 2}, None),
        ({"dim": 24, "hidden_dim": 1, "num_heads": 6, "num_kv_heads": 2}, None),
        ({"dim": 24, "hidden_dim": 9973, "num_heads": 6, "num_kv_heads": 2}, None),
        ({"dim": 288, "hidden_dim": 0, "num_heads": 6, "num_kv_heads": 6, "multiple_of": 32}, None),
    ],
)
def test_params_give_the_width_by_metas_rule(changes, expected):
    config = ModelConfig(vocab_size=32000, num_layers=2, context_length=4096, **changes)
    params = meta_params.from_config(config)
    width = int(2 * 4 * params["dim"] / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    width = params["multiple_of"] * -(-width // params["multiple_of"])
    assert width == config.ffn_dim
    assert "max_seq_len" not in params
    assert params.get("n_kv_heads", params["n_heads"]) == config.num_kv_heads
    if expected:
        assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == expected


def test_a_width_that_metas_rule_never_gives_is_refused():
    sizes = {"vocab_size": 53, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
    config = ModelConfig(**sizes, dim=3072, hidden_dim=1, context_length=32)
    with pytest.raises(UserError, match="hidden_dim=1 is not a width"):
        meta_params.from_config(config)


@pytest.mark.parametrize(
    "choice",
    [
        {"norm_eps": 1e-6},
        {"rope_theta": 1e6},
        {"rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
        {"context_length": 16384},
    ],
)
def test_choices_survive(tmp_path, choice):
    meta.write(untied(**choice), tmp_path / "out")
    config = meta.read(tmp_path / "out").config
    for name, value in choice.items():
        assert getattr(config, name) == value
    assert config.context_length == choice.get("context_length", 32)


@pytest.mark.parametrize(
    "scaling", [{"kind": "linear", "factor": 2.0}, {"kind": "llama3", "factor": 32.0}]
)
def test_rope_that_meta_has_no_word_for_is_refused(tmp_path, scaling):
    with pytest.raises(UserError, match="rope_scaling"):
        meta.write(untied(rope_scaling=RopeScaling(**scaling)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_heads": 6.0}, "n_heads=6.0"),
        ({"n_heads": "6"}, "n_heads='6'"),
        ({"n_heads": True}, "n_heads=True"),
        ({"n_heads": 0}, "num_heads=0"),
        ({"n_heads": 5}, "5"),
        ({"n_heads": 24}, "odd"),
        ({"n_heads": 10**400}, "too large"),
        ({"n_heads": 3}, "num_heads=3"),
        ({"n_heads": 12}, "wk"),
        ({"n_kv_heads": 0}, "num_kv_heads=0"),
        ({"n_kv_heads": 3}, "wk"),
        ({"n_layers": 10**9}, "n_layers=1000000000"),
        ({"n_layers": 2}, "n_layers=2"),
        ({"n_layers": -3}, "n_layers=-3"),
        ({"dim": 48}, "right params.json"),
        ({"dim": 0}, "dim=0"),
        ({"dim": -24}, "dim=-24"),
        ({"dim": 10**30}, "dim=1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": -2}, "vocab_size=-2"),
        ({"vocab_size": 32000}, "283"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": "1e-5"}, "norm_eps"),
        ({"norm_eps": 10**400}, "too large"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
        ({"max_seq_len": 2**25}, "max_seq_len"),
        ({"use_scaled_rope": 1}, "use_scaled_rope"),
        ({"moe": {"num_experts": 8}}, "moe"),
        ({"vision_chunk_size": 448, "lora_args": {}}, "vision_chunk_size, lora_args"),
        ({"quantization_args": None}, "quantization_args"),
        ({"\x1b[2J\n": 1}, "another architecture"),
    ],
)
def test_absurd_params_are_refused(folder, changes, word):
    set_params(folder, **changes)
    assert refused(folder, word).isprintable()


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads"])
def test_missing_params_are_named(folder, name):
    set_params(folder, [name])
    refused(folder, "params.json", f"'{name}' is missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"dim": ' + b"9" * 5000 + b"}"],
)
def test_params_that_are_no_json_are_refused(folder, content):
    (folder / "params.json").write_bytes(content)
    refused(folder, "params.json")


def test_missing_or_giant_params_are_refused(folder):
    (folder / "params.json").write_bytes(bytes(2**20 + 1))
    refused(folder, "params.json", "bytes")
    (folder / "params.json").unlink()
    refused(folder, "params.json is missing")


# Folders


def test_a_single_file_of_any_name(folder):
    expected = untied("bfloat16")
    (folder / "consolidated.00.pth").rename(folder / "mine.pth")
    same(meta.read(folder / "mine.pth"), expected)
    same(meta.read(folder), expected)
    (folder / "params.json").rename(folder / "mine.json")
    same(meta.read(folder / "mine.pth"), expected)
    shutil.copy(folder / "mine.pth", folder / "yours.pth")
    refused(folder, "2 .pth files")
    refused(folder / "yours.pth", "params.json is missing")


@pytest.mark.parametrize("lost", [[0], [1], [7], [3, 5], [4, 5, 6, 7]])
def test_missing_shards_are_named(eight, lost):
    for number in lost:
        (eight / f"consolidated.{number:02}.pth").unlink()
    refused(eight, "8 shards", *[f"consolidated.{number:02}.pth" for number in lost], "missing")


def test_one_shard_of_many_is_not_a_model(eight):
    refused(eight / "consolidated.00.pth", "8 shards", "folder")


def test_a_shard_too_many_is_named(folder):
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    refused(folder, "say 1 shards", "consolidated.01.pth is not of them")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.update({"norm.weight": a["norm.weight"][:95]}), "norm.weight"),
        (lambda a: a.update({"layers.1.attention.wk.weight": np.ones((5, 96))}), "wk"),
        (lambda a: a.update({"output.weight": a["output.weight"].astype(np.float16)}), "float16"),
        (lambda a: a.pop("layers.2.ffn_norm.weight"), "missing"),
        (lambda a: a.update({"extra.weight": np.ones(2, np.float32)}), "extra.weight"),
    ],
)
def test_shards_of_different_models_are_refused(eight, change, word):
    rewrite(eight / "consolidated.05.pth", change)
    refused(eight, "consolidated.05.pth", word)


def test_flat_parts_of_matrices_are_refused(eight):
    flat = {"layers.1.attention.wo.weight": np.ones(96, np.float32)}
    for path in eight.glob("*.pth"):
        rewrite(path, lambda arrays: arrays.update(flat))
    refused(eight, "layers.1.attention.wo.weight is [96], expected [96, 96]")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.update({"norm.weight": np.ones(25, np.float32)}), "[25], expected [24]"),
        (lambda a: a.update({"norm.weight": np.ones(24, np.float64)}), "float64"),
        (lambda a: a.update({"norm.weight": np.ones((), np.float32)}), "[], expected [24]"),
        (
            lambda a: a.pop("layers.1.attention.wo.weight"),
            "layers.1.attention.wo.weight is missing",
        ),
        (lambda a: a.pop("tok_embeddings.weight"), "tok_embeddings.weight is missing"),
        (lambda a: a.pop("layers.0.attention.wq.weight"), "Meta's own names"),
        (lambda a: a.pop("layers.0.feed_forward.w1.weight"), "w1.weight is missing"),
        (lambda a: a.update({"model.x": np.ones(2, np.float32)}), "model.x is unknown"),
        (lambda a: a.update({"layers.9.x": np.ones(2, np.float32)}), "n_layers=3"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones(24)}), "Meta's own names"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones((0, 24))}), "[0, 24]"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones((9, 24))}), "[9, 24]"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones((8, 24))}), "[8, 24]"),
        (lambda a: a.update({"tok_embeddings.weight": np.ones((0, 24), np.float32)}), "rows"),
        (lambda a: a.update({"tok_embeddings.weight": np.ones((), np.float32)}), "expected [283"),
        (lambda a: a.update({"output.weight": np.ones((9, 24), np.float32)}), "[9, 24], expected"),
        (lambda a: a.clear(), "Meta's own names"),
    ],
)
def test_tensors_that_disagree_with_params_are_refused(folder, change, word):
    rewrite(folder / "consolidated.00.pth", change)
    refused(folder, word)


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/"])
def test_files_that_are_no_shards_are_refused(folder, content):
    (folder / "consolidated.00.pth").write_bytes(content)
    refused(folder, "consolidated.00.pth")


def test_folders_without_models_are_refused(tmp_path):
    refused(tmp_path, "no consolidated.00.pth")
    refused(tmp_path / "absent", "does not exist")


# Tokenizers


def test_the_tokenizer_is_found_beside_or_one_level_up_or_is_none(folder):
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    assert meta.read(folder).tokenizer == model
    (folder.parent / "tokenizer.model").rename(folder.parent / "other.model")
    assert meta.read(folder).tokenizer == b""
    assert meta.read(folder, tokenizer=folder.parent / "other.model").tokenizer == model


def test_a_folder_is_the_same_from_inside(folder, monkeypatch):
    model = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    monkeypatch.chdir(folder)
    assert meta.read(Path()).tokenizer == model


def test_tokenizers_that_do_not_fit_are_refused(folder):
    (folder / "tokenizer.model").write_bytes(tiny_vocabulary(280).to_model())
    refused(folder, "280", "283", "--tokenizer")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    refused(folder, "not a SentencePiece model")
    refused(folder, "does not exist", tokenizer=folder / "absent.model")


# Mutations

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 100),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just(10**400),
)
keys = st.sampled_from([*(field.name for field in dataclasses.fields(meta_params.Params)), "moe"])


@given(changes=st.dictionaries(keys, values, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_params_are_refused_or_fit_the_tensors(good, tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "params"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    set_params(folder, **changes)
    try:
        weights = meta.read(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    shapes = {name: tensor.shape for name, tensor in untied("bfloat16").tensors.items()}
    if weights.config.num_heads == 6:
        assert {name: tensor.shape for name, tensor in weights.tensors.items()} == shapes
        same(weights, untied("bfloat16"))
