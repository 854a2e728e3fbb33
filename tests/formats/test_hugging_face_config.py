import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import SIZES

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats.huggingface.config import from_hugging_face, to_hugging_face

LLAMA_2_7B = {  # as Meta's own folder has it
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
OUR_7B = ModelConfig(
    vocab_size=32_000,
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    context_length=4096,
    tied_embeddings=False,
)
TINY = ModelConfig(**SIZES)
VALUES = to_hugging_face(TINY, "float32")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(**changes):
    """The config of the tiny model's keys with others changed; `...` takes one away."""
    values = {key: value for key, value in (VALUES | changes).items() if value is not ...}
    return from_hugging_face(values, "config.json")


def test_llama_2_is_read_by_its_rule():
    assert from_hugging_face(LLAMA_2_7B, "config.json") == OUR_7B


def test_what_is_written_for_llama_2():
    written = to_hugging_face(OUR_7B, "float16")
    assert {key: written[key] for key in LLAMA_2_7B.keys() & written.keys()} == {
        key: LLAMA_2_7B[key] for key in LLAMA_2_7B.keys() & written.keys()
    }
    new = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    new |= {"head_dim": 128, "rope_theta": 10000.0}
    assert {key: written[key] for key in written.keys() - LLAMA_2_7B.keys()} == new


def test_absent_keys_mean_what_they_mean_to_transformers():
    config = from_hugging_face({"model_type": "llama"}, "config.json")
    changes = {"context_length": 2048, "norm_eps": 1e-6}
    assert config == dataclasses.replace(OUR_7B, **changes)
    assert from_hugging_face({"architectures": ["LlamaForCausalLM"]}, "x") == config
    heads = {"num_key_value_heads": None, "head_dim": None}
    assert read(**heads).num_kv_heads == 6
    assert read(num_key_value_heads=...).num_kv_heads == 6


@pytest.mark.parametrize(
    ("said", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, RopeScaling()),
        ({"rope_theta": 7}, 7.0, RopeScaling()),
        ({"rope_scaling": {"rope_type": "default"}}, 1e4, RopeScaling()),
        ({"rope_scaling": {}}, 1e4, RopeScaling()),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 9e3},
            9e3,
            RopeScaling(kind="linear", factor=4.0),
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.5}},
            1e4,
            RopeScaling(kind="linear", factor=2.5),
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
            1e4,
            RopeScaling(kind="llama3", factor=8.0, original_context=16),
        ),
        (
            {"rope_scaling": LLAMA3, "max_position_embeddings": 77},
            1e4,
            RopeScaling(kind="llama3", factor=8.0, original_context=77),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, RopeScaling()),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, RopeScaling()),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e4}},
            3e4,
            RopeScaling(kind="linear", factor=4.0),
        ),
    ],
)
def test_every_form_of_rope_settings_is_read(said, theta, scaling):
    config = read(**{"rope_theta": ..., "rope_scaling": ...} | said)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ({"architectures": ["LlamaForCausalLM", "x"]}, "is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "is not supported"),
        ({"architectures": ["a\nb"]}, r"'a\\nb' is not supported"),
        ({"architectures": [["a"]]}, "is not supported; expected LlamaForCausalLM"),
        ({"architectures": ["LLaMAForCausalLM"]}, None),
        ({"architectures": ...}, None),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"model_type": ..., "architectures": ...}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' \(expected 'silu' or"),
        ({"hidden_act": "swish"}, None),
        ({"sliding_window": None, "quantization_config": None, "rope_interleaved": False}, None),
        ({"partial_rotary_factor": None, "layer_types": None, "num_local_experts": 0}, None),
        ({"layer_types": ["full_attention"] * 3}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ({"layer_types": "full_attention"}, "layer_types = "),
        ({"rope_interleaved": True}, " rope_interleaved = True"),
        ({"final_logit_softcapping": 30.0}, " final_logit_softcapping = 30.0"),
        ({"attention_bias": 0}, "attention_bias = 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 1}, None),
        ({"sliding_window": 4096}, " sliding_window = 4096"),
        ({"quantization_config": {"bits": 4}}, r" quantization_config = \{'bits': 4\}"),
        ({"num_local_experts": 8}, " num_local_experts = 8"),
        ({"head_dim": 5}, r"head_dim=5 is odd"),
        ({"head_dim": 4}, None),
        ({"num_attention_heads": 5, "head_dim": ...}, "does not divide into model.num_heads=5"),
        ({"num_key_value_heads": 4}, "does not divide over model.num_kv_heads=4"),
        ({"num_attention_heads": 6.0}, "num_attention_heads = 6.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"vocab_size": "32000"}, "vocab_size = '32000'"),
        ({"hidden_size": 2**63}, "hidden_size = 9223372036854775808"),
        ({"intermediate_size": []}, r"intermediate_size = \[\]"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps = 1000"),
        ({"rms_norm_eps": -1e-5}, "norm_eps=-1e-05 is out of range"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ({"rope_theta": 0}, "rope_theta=0.0 is out of range"),
        ({"rope_theta": None}, "rope_theta = None"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "scaling.type = 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "alpha": 1}}, "scaling.alpha = 1"),
        ({"rope_scaling": {"rope_type": "yarn", "truncate": 1}}, "scaling.truncate = 1"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type = "),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "scaling.type = 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling.factor = None \(expected a number\)"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor = '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 is out of range"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x\ny": 1}}, r"rope_scaling.'x\\ny' = 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor = None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "is not below"),
        ({"rope_scaling": {"rope_theta": 5e5}}, "rope_scaling.rope_theta = 500000.0"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "another one than"),
        ({"rope_parameters": 3}, "rope_parameters = 3"),
    ],
)
def test_unknown_keys_are_refused_by_name(changes, reason):
    if reason is None:
        assert read(**changes) == TINY
        return
    with pytest.raises(UserError, match=reason) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 1  # of a file, not of the command line


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
MISTRAL |= {"attention_bias": ..., "mlp_bias": ..., "pretraining_tp": ...}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 9, "layer_types": ["sliding_attention"] * 3}, 9),
        ({"sliding_window": None}, 0),
        ({}, 4096),
    ],
)
def test_mistral_is_a_llama_with_a_window(changes, window):
    assert read(**MISTRAL | changes) == dataclasses.replace(TINY, sliding_window=window)


def test_absent_keys_of_mistral_mean_what_they_mean_to_transformers():
    config = from_hugging_face({"model_type": "mistral"}, "config.json")
    assert (config.num_kv_heads, config.ffn_dim, config.context_length) == (8, 14_336, 131_072)
    assert config.sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"sliding_window": "9"}, "sliding_window = '9'"),
        ({"sliding_window": 9, "layer_types": ["full_attention"]}, "layer_types = "),
    ],
)
def test_what_mistral_has_not_is_refused(changes, reason):
    with pytest.raises(UserError, match=reason):
        read(**MISTRAL | changes)


def test_positions_that_transformers_has_not_are_refused():
    config = dataclasses.replace(TINY, position="relative")
    with pytest.raises(UserError, match=r"model.position='relative': .* 'rope' only; choose"):
        to_hugging_face(config, "float32")


def test_a_window_with_biases_has_no_class_in_transformers():
    config = dataclasses.replace(TINY, sliding_window=9, mlp_bias=True)
    with pytest.raises(UserError, match=r"model.sliding_window=9 and biases: "):
        to_hugging_face(config, "float32")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"factor": 4.0, "finetuned": True}, {"factor": 4.0, "original_context": 32}),
        ({"original_max_position_embeddings": 8}, {"factor": 4.0, "original_context": 8}),
        ({"factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}, {"attention_factor": 1.0}),
        ({"factor": 2.0, "beta_fast": 8, "beta_slow": None}, {"beta_fast": 8.0, "beta_slow": 1.0}),
    ],
)
def test_yarn_is_read_with_its_defaults(changes, expected):
    scaling = read(rope_scaling={"rope_type": "yarn"} | changes).rope_scaling
    assert scaling.kind == "yarn" and expected.items() <= vars(scaling).items()


def test_an_original_context_beside_the_scaling_wins():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    assert read(rope_scaling=yarn, original_max_position_embeddings=16).rope_scaling == (
        RopeScaling(kind="yarn", factor=2.0, original_context=16)
    )


def test_dynamic_scaling_extends_the_context_by_its_factor():
    config = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert config.context_length == 64
    assert config.rope_scaling == RopeScaling(kind="dynamic", factor=2.0, original_context=32)


def test_all_problems_are_listed():
    with pytest.raises(UserError) as caught:
        read(hidden_act="gelu", vocab_size=0, sliding_window=1)
    assert all(key in str(caught.value) for key in ("hidden_act", "vocab_size", "sliding_window"))


def test_many_problems_are_one_line():
    with pytest.raises(UserError, match="and 994 more") as caught:
        read(**{f"rope{number}": "x" * 10_000 for number in range(1000)})
    assert len(str(caught.value)) < 1000


def test_keys_that_change_no_logit_are_listed_once(capsys):
    assert read(_commit_hash="ab", unk_token_id=0, is_llama_config=True, other=None) == TINY
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1 and "other" not in warned
    assert "config.json: ignored _commit_hash, is_llama_config, with which Llama" in warned
    assert read(**{"transformers.js_config": {"dtype": "q4"}, "temperature": 0.6}) == TINY
    assert "ignored 'transformers.js_config', temperature, with" in capsys.readouterr().err
    assert read(**{f"key{number}": "x" * 10_000 for number in range(1000)}) == TINY
    warned = capsys.readouterr().err
    assert "and 994 more" in warned and len(warned) < 500


def test_an_original_context_does_not_matter_in_linear_scaling():
    linear = {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}
    config = read(rope_scaling=linear | {"low_freq_factor": None})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 9),
    groups=st.integers(1, 4),
    half=st.integers(1, 40),
    width=st.integers(0, 500),
    tied=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-6, 1e-12]),
    std=st.floats(0, 1),
    theta=st.floats(1.001, 1e7),
    scaling=st.sampled_from(
        [
            RopeScaling(),
            RopeScaling(kind="linear", factor=3.5),
            RopeScaling(kind="llama3", factor=32.0, low_frequency_factor=0.5, original_context=9),
            RopeScaling(kind="yarn", factor=4.0, beta_fast=16.0, original_context=9),
            RopeScaling(kind="yarn", factor=2.5, attention_factor=0.7, truncate=False),
            RopeScaling(kind="dynamic", factor=3.0, original_context=11),
        ]
    ),
    variant=st.sampled_from(
        [{}, {"sliding_window": 7}, {"attention_bias": True}, {"mlp_bias": True}]
    ),
)
def test_a_config_comes_back(heads, groups, half, width, tied, eps, std, theta, scaling, variant):
    config = ModelConfig(
        vocab_size=41,
        dim=2 * half * heads * groups,
        num_layers=3,
        num_heads=heads * groups,
        num_kv_heads=heads,
        context_length=33,
        hidden_dim=width,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=tied,
        init_std=std,
        head_dim=0 if half > 1 else 6,
        **variant,
    )
    back = from_hugging_face(json.loads(json.dumps(to_hugging_face(config, "float32"))), "x")
    assert back.ffn_dim == config.ffn_dim
    assert dataclasses.replace(back, hidden_dim=config.hidden_dim) == config


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
ODD |= st.sampled_from([[], {}, [1], {"rope_type": "linear"}, 10**400, "llama3", 1e-300])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*VALUES, "rope_parameters", "new"]), ODD, min_size=1))
def test_odd_values_are_refused_or_give_a_config(changes):
    try:
        config = from_hugging_face(VALUES | changes, "config.json")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
    else:
        assert isinstance(config, ModelConfig)
