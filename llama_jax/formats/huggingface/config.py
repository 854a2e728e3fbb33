"""How Hugging Face configs say what rotary positions do: three spellings that grew over years.

`rope_theta` and `rope_scaling` apart, or `rope_parameters` with both inside; within them the kind
is called `rope_type`, once `type`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.json_files import Fields, shown

THETA = 10_000.0  # where nothing is said
ORIGINAL = "original_max_position_embeddings"
KINDS = {  # theirs: ours
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
}


def read_rope(fields: Fields, context: int) -> tuple[float, dict[str, Any]]:
    """The base of the wavelengths, and the fields of `RopeScaling`; complaints go to `fields`.

    Args:
      fields: of the whole config.
      context: the longest sequence, which Hugging Face takes for the old context if that is absent.
    """
    spellings = {key: fields.value(key, None) for key in ("rope_scaling", "rope_parameters")}
    said = {key: value for key, value in spellings.items() if value}
    if len(said) == 2 and said["rope_scaling"] != said["rope_parameters"]:
        fields.complain("rope_scaling", "another one than rope_parameters; expected one of them")
    key, value = next(iter(said.items()), ("rope_scaling", {}))
    if not isinstance(value, dict):
        fields.complain(key, "expected null or an object")
        value = {}
    inner = Fields(value, within=key)
    theta = _theta(fields, inner)
    scaling = _scaling(inner, context)
    if scaling:
        inner.refuse_others()
    fields.problems += inner.problems
    return theta, scaling


def _theta(fields: Fields, inner: Fields) -> float:
    """The base, which may stand inside, outside, or at both places if they agree."""
    outside = fields.number("rope_theta", THETA)
    inside = inner.number("rope_theta", outside)
    if "rope_theta" in fields.values and inside != outside:
        inner.complain("rope_theta", f"but rope_theta = {outside:g} outside; expected one")
    return inside


def _scaling(inner: Fields, context: int) -> dict[str, Any]:
    """What is in a `rope_scaling`, as fields of ours."""
    kind = inner.value("rope_type", inner.value("type", "default"))
    if inner.value("type", kind) != kind:
        inner.complain("type", "another one than rope_type; expected one of them")
    inner.require("partial_rotary_factor", 1.0)
    if not isinstance(kind, str) or kind not in KINDS:
        key = "rope_type" if "rope_type" in inner.values else "type"
        inner.complain(key, f"expected one of {', '.join(KINDS)}")
        return {}
    fields: dict[str, Any] = {"kind": KINDS[kind]}
    if kind != "default":
        fields["factor"] = _needed(inner, "factor")
    if kind == "llama3":
        fields["low_frequency_factor"] = _needed(inner, "low_freq_factor")
        fields["high_frequency_factor"] = _needed(inner, "high_freq_factor")
        fields["original_context"] = inner.size(ORIGINAL, context, 2**31 - 1)
    return fields


def _needed(inner: Fields, key: str) -> float:
    if key not in inner.values:
        inner.complain(key, "expected a number")
    return inner.number(key, 1.0)


def rope_keys(theta: float, scaling: RopeScaling) -> Mapping[str, Any]:
    """The keys of a config, spelled as every version of transformers reads them."""
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = float(scaling.low_frequency_factor)
        values["high_freq_factor"] = float(scaling.high_frequency_factor)
        values[ORIGINAL] = scaling.original_context
    is_plain = scaling.kind == "none"
    return {"rope_theta": float(theta), "rope_scaling": None if is_plain else values}


# The config.json of a Hugging Face Llama and our `ModelConfig`, in both directions.
#
# Every key is understood, or known to change nothing, or refused by name: one that is silently
# ignored would give a model that runs and is wrong. Absent keys mean what they mean to
# `transformers.LlamaConfig`. Does not know tensors.

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"
SIZES = {  # theirs: ours, what its absence means, the largest that is believed
    "vocab_size": ("vocab_size", 32_000, 2**24),
    "hidden_size": ("dim", 4096, 2**20),
    "num_hidden_layers": ("num_layers", 32, 2**10),
    "num_attention_heads": ("num_heads", 32, 2**16),
    "max_position_embeddings": ("context_length", 2048, 2**31 - 1),
}
FIXED = {  # we do nothing else
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
HARMLESS = {  # of training, generation, storage and output: they change no logit
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("_name_or_path", "tokenizer_class", "transformers_version", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_sequence_length"),
    *("attention_dropout", "chunk_size_feed_forward", "pretraining_tp", "use_cache"),
    *("id2label", "label2id", "problem_type", "return_dict"),
    *("output_attentions", "output_hidden_states", "unsloth_fixed", "unsloth_version"),
    *("architectures", "model_type"),  # looked at before
}


def from_hugging_face(values: Mapping[str, Any], source: object) -> ModelConfig:
    """The shape that a config.json describes; its compute dtype is left at the default.

    Args:
      source: what an error calls the file.

    Raises:
      UserError: one line with every key that is not understood or not believed.
    """
    _require_llama(values, source)
    fields = Fields(values)
    for key, expected in FIXED.items():
        fields.require(key, expected)
    ours: dict[str, Any] = {
        name: fields.size(key, default, most) for key, (name, default, most) in SIZES.items()
    }
    ours["num_kv_heads"] = _nullable_size(fields, "num_key_value_heads", ours["num_heads"])
    ours["hidden_dim"] = fields.size("intermediate_size", 11_008, 2**24)
    ours["norm_eps"] = fields.number("rms_norm_eps", 1e-6)
    ours["init_std"] = fields.number("initializer_range", 0.02)
    ours["tied_embeddings"] = fields.flag("tie_word_embeddings", False)
    head_dim = _nullable_size(fields, "head_dim", 0)
    if head_dim * ours["num_heads"] != ours["dim"]:
        ours["head_dim"] = head_dim
    ours["rope_theta"], scaling = read_rope(fields, ours["context_length"])
    fields.refuse_others(HARMLESS)
    fields.raise_problems(f"{source} cannot be read as a Llama 2:")
    try:
        config = ModelConfig(**ours, rope_scaling=RopeScaling(**scaling))
    except UsageError as error:
        raise UserError(f"{source} describes no Llama that can run: {error}") from error
    return _by_rule(config)


def to_hugging_face(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The keys of a config.json; `dtype` is that of the stored matrices, by name."""
    sizes = {key: getattr(config, name) for key, (name, _, _) in SIZES.items()}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **sizes,
        "intermediate_size": config.ffn_dim,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": FIXED["hidden_act"],
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": FIXED["attention_bias"],
        "mlp_bias": FIXED["mlp_bias"],
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _require_llama(values: Mapping[str, Any], source: object) -> None:
    """`UserError` naming the architecture if it is another one, or if none is named."""
    names = values.get("architectures")
    kind = values.get("model_type")
    if names not in (None, [ARCHITECTURE]):
        name = names[0] if isinstance(names, list) and len(names) == 1 else names
    elif kind not in (None, MODEL_TYPE) or (names is None and kind is None):
        name = f"a model of model_type {shown(kind)}"
    else:
        return
    name = name if isinstance(name, str) and name.isprintable() else shown(name)
    raise UserError(f"{source}: {name} is not a Llama 2; expected {ARCHITECTURE}")


def _nullable_size(fields: Fields, key: str, default: int) -> int:
    return default if fields.value(key, None) is None else fields.size(key, default, 2**20)


def _by_rule(config: ModelConfig) -> ModelConfig:
    """The same config without an explicit feed-forward width where the usual rule gives it."""
    ruled = dataclasses.replace(config, hidden_dim=0)
    return ruled if ruled.ffn_dim == config.ffn_dim else config
