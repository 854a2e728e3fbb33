"""The config.json of a Hugging Face Llama and our `ModelConfig`, in both directions.

A key is understood, or known to change no logit, or refused by name if it may change the
mathematics; any other is ignored, as transformers does, and listed in a warning. Absent keys mean
what they mean to `transformers.LlamaConfig`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError, warn
from llama_jax.formats.json_files import MAX_LISTED, Fields, shown, shown_key

ARCHITECTURES = {  # by model_type: transformers' class, and its spelling in early conversions
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM"),
}
SIZES = {  # theirs: ours, the default, the maximum
    "vocab_size": ("vocab_size", 32_000, 2**24),
    "hidden_size": ("dim", 4096, 2**20),
    "num_hidden_layers": ("num_layers", 32, 2**10),
    "num_attention_heads": ("num_heads", 32, 2**16),
    "max_position_embeddings": ("context_length", 2048, 2**31 - 1),
}
ACTIVATIONS = ("silu", "swish")  # two names of one function
FIXED = {  # the only values that are supported, beside null
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
    *("architectures", "model_type"),  # checked by `_model_type`
}
MATHEMATICS = re.compile(  # in the name of a key that may change what the model computes
    "expert|softcap|norm|rope|rotary|scal|multiplier|alibi|window|bias|_act|quant|lora|residual"
)
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
    model_type = _model_type(values, source)
    fields = Fields(values)
    for key, expected in FIXED.items():
        if fields.value(key, None) is not None:
            fields.require(key, expected)
    if fields.value("hidden_act", ACTIVATIONS[0]) not in ACTIVATIONS:
        fields.complain("hidden_act", f"expected {' or '.join(map(repr, ACTIVATIONS))}")
    kinds = fields.value("layer_types", None) or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        fields.complain("layer_types", "expected 'full_attention' for each layer")
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
    others = [key for key in fields.others() if key not in HARMLESS]
    unused = [key for key in others if not MATHEMATICS.search(key.lower())]
    for key in others:
        if key not in unused:
            fields.refuse(key)
    fields.raise_problems(f"{source} cannot be read as a Llama:")
    if unused:
        more = f" and {len(unused) - MAX_LISTED} more" if len(unused) > MAX_LISTED else ""
        listed = ", ".join(map(shown_key, unused[:MAX_LISTED]))
        name = ARCHITECTURES[model_type][0]
        warn(f"{source}: ignored {listed}{more}, with which {name} does not compute")
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
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "intermediate_size": config.ffn_dim,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": ACTIVATIONS[0],
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


def _model_type(values: Mapping[str, Any], source: object) -> str:
    """Return a key of `ARCHITECTURES`; `UserError` for a model of another class."""
    names, kind = values.get("architectures"), values.get("model_type")
    for known, spellings in ARCHITECTURES.items() if (names, kind) != (None, None) else ():
        if kind in (None, known) and names in (None, *([name] for name in spellings)):
            return known
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if names is None or any(name in spellings for spellings in ARCHITECTURES.values()):
        name = f"a model of model_type {shown(kind)}"
    name = name if isinstance(name, str) and name.isprintable() else shown(name)
    expected = " or ".join(names[0] for names in ARCHITECTURES.values())
    raise UserError(f"{source}: {name} is not supported; expected {expected}")


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
    original = inner.size(ORIGINAL, context, 2**31 - 1)  # in some linear ones too, unused
    if kind == "llama3":
        fields["original_context"] = original
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
