"""params.json: reading, defaults, and refusals in one line."""

import dataclasses
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_folders import refused, rewrite, set_params, untied
from tiny_weights import same

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats.meta import model as meta
from llama_jax.formats.meta import params as meta_params


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
def test_settings_come_back(tmp_path, choice):
    meta.write(untied(**choice), tmp_path / "out")
    config = meta.read(tmp_path / "out").config
    for name, value in choice.items():
        assert getattr(config, name) == value
    assert config.context_length == choice.get("context_length", 32)


@pytest.mark.parametrize(
    "scaling", [{"kind": "linear", "factor": 2.0}, {"kind": "llama3", "factor": 32.0}]
)
def test_rope_that_params_cannot_express_is_refused(tmp_path, scaling):
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
        ({"n_heads": 10**400}, "heads=1000"),
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
        ({"norm_eps": float("nan")}, "NaN is not a number"),
        ({"norm_eps": "1e-5"}, "norm_eps"),
        ({"norm_eps": 10**400}, "too large"),
        ({"rope_theta": float("inf")}, "Infinity is not a number"),
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


def test_missing_or_broken_params_are_refused(folder):
    (folder / "params.json").write_bytes(bytes(99))
    refused(folder, "params.json is not JSON")
    (folder / "params.json").unlink()
    refused(folder, "params.json is missing")


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
