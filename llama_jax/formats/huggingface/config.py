"""The config.json of a Hugging Face Llama and our `ModelConfig`, in both directions.

Every key is understood, or known to change no logit, or refused by name: one that is silently
ignored would give a model that runs and is wrong. Absent keys mean what they mean to
`transformers.LlamaConfig`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.json_files import Fields, shown

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"
SIZES = {  # theirs: ours, the default, the maximum
    "vocab_size": ("vocab_size", 32_000, 2**24),
    "hidden_size": ("dim", 4096, 2**20),
    "num_hidden_layers": ("num_layers", 32, 2**10),
    "num_attention_heads": ("num_heads", 32, 2**16),
    "max_position_embeddings": ("context_length", 2048, 2**31 - 1),
}
FIXED = {  # the only values that are supported
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
    *("architectures", "model_type"),  # checked by `_check_architecture`
}
ROPE_THETA = 10_000.0  # the default
ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}  # theirs: ours
ORIGINAL = "original_max_position_embeddings"


def from_hugging_face(values: Mapping[str, Any], source: object) -> ModelConfig:
    """Return the config that a config.json describes, with the default compute dtype.

    Args:
      source: what an error calls the file.

    Raises:
      UserError: one line with every key that is not understood or has an absurd value.
    """
    _check_architecture(values, source)
    fields = Fields(values)
    for key, expected in FIXED.items():
        fields.require(key, expected)
    ours: dict[str, Any] = {
        name: fields.size(key, default, largest) for key, (name, default, largest) in SIZES.items()
    }
    ours["num_kv_heads"] = _size_or_null(fields, "num_key_value_heads", ours["num_heads"])
    ours["hidden_dim"] = fields.size("intermediate_size", 11_008, 2**24)
    ours["norm_eps"] = fields.number("rms_norm_eps", 1e-6)
    ours["init_std"] = fields.number("initializer_range", 0.02)
    ours["tied_embeddings"] = fields.flag("tie_word_embeddings", False)
    head_dim = _size_or_null(fields, "head_dim", 0)
    if head_dim * ours["num_heads"] != ours["dim"]:
        ours["head_dim"] = head_dim
    ours["rope_theta"], scaling = read_rope(fields, ours["context_length"])
    fields.refuse_others(HARMLESS)
    fields.raise_problems(f"{source} cannot be read as a Llama 2:")
    try:
        config = ModelConfig(**ours, rope_scaling=RopeScaling(**scaling))
    except UsageError as error:
        raise UserError(f"{source} describes no Llama that can run: {error}") from error
    ruled = dataclasses.replace(config, hidden_dim=0)  # the width that the usual rule gives
    return ruled if ruled.ffn_dim == config.ffn_dim else config


def to_hugging_face(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the keys of a config.json; `dtype` is the name of the stored matrices' dtype."""
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


def _check_architecture(values: Mapping[str, Any], source: object) -> None:
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


def _size_or_null(fields: Fields, key: str, default: int) -> int:
    return default if fields.value(key, None) is None else fields.size(key, default, 2**20)


def read_rope(fields: Fields, context: int) -> tuple[float, dict[str, Any]]:
    """Return rope_theta, and the fields of `RopeScaling`; problems are added to `fields`.

    Files have `rope_theta` and `rope_scaling`, or `rope_parameters` with both in it; in either,
    the kind is `rope_type`, or `type` in older ones.

    Args:
      fields: of the whole config.
      context: of the model, the default of the original context.
    """
    both = {key: fields.value(key, None) for key in ("rope_scaling", "rope_parameters")}
    given = {key: value for key, value in both.items() if value}
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        fields.complain("rope_scaling", "another one than rope_parameters; expected one of them")
    key, value = next(iter(given.items()), ("rope_scaling", {}))
    if not isinstance(value, dict):
        fields.complain(key, "expected null or an object")
        value = {}
    inner = Fields(value, within=key)
    outside = fields.number("rope_theta", ROPE_THETA)
    theta = inner.number("rope_theta", outside)
    if "rope_theta" in fields.values and theta != outside:
        inner.complain("rope_theta", f"but rope_theta = {outside:g} outside; expected one")
    scaling = _read_scaling(inner, context)
    if scaling:
        inner.refuse_others()
    fields.problems += inner.problems
    return theta, scaling


def _read_scaling(inner: Fields, context: int) -> dict[str, Any]:
    kind = inner.value("rope_type", inner.value("type", "default"))
    if inner.value("type", kind) != kind:
        inner.complain("type", "another one than rope_type; expected one of them")
    inner.require("partial_rotary_factor", 1.0)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        key = "rope_type" if "rope_type" in inner.values else "type"
        inner.complain(key, f"expected one of {', '.join(ROPE_TYPES)}")
        return {}
    needed = {"factor": "factor"} if kind != "default" else {}
    if kind == "llama3":
        needed["low_frequency_factor"] = "low_freq_factor"
        needed["high_frequency_factor"] = "high_freq_factor"
    fields: dict[str, Any] = {"kind": ROPE_TYPES[kind]}
    for ours, key in needed.items():
        if key not in inner.values:
            inner.complain(key, "expected a number")
        fields[ours] = inner.number(key, 1.0)
    if kind == "llama3":
        fields["original_context"] = inner.size(ORIGINAL, context, 2**31 - 1)
    return fields


def rope_keys(theta: float, scaling: RopeScaling) -> Mapping[str, Any]:
    """Return the keys of a config in the form that every version of transformers reads."""
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = float(scaling.low_frequency_factor)
        values["high_freq_factor"] = float(scaling.high_frequency_factor)
        values[ORIGINAL] = scaling.original_context
    is_plain = scaling.kind == "none"
    return {"rope_theta": float(theta), "rope_scaling": None if is_plain else values}
