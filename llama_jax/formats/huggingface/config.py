"""The config.json of a Hugging Face Llama and our `ModelConfig`, in both directions.

A key is understood, or known to change no logit, or refused by name if it may change the
mathematics; any other is ignored, as transformers does, and listed in a warning. Absent keys mean
what they mean to `transformers.LlamaConfig` or `MistralConfig`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.config import ROPE_SCALINGS, ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError, warn
from llama_jax.formats.json_files import MAX_LISTED, Fields, shown, shown_key

ARCHITECTURES = {  # by model_type: transformers' class, and its spelling in early conversions
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM"),
    "mistral": ("MistralForCausalLM",),  # a Llama with a sliding window and without biases
}
SIZES = {  # theirs: ours, the default, the maximum
    "vocab_size": ("vocab_size", 32_000, 2**24),
    "hidden_size": ("dim", 4096, 2**20),
    "num_hidden_layers": ("num_layers", 32, 2**10),
    "num_attention_heads": ("num_heads", 32, 2**16),
    "max_position_embeddings": ("context_length", 2048, 2**31 - 1),
}
WIDTH, KV_HEADS, WINDOW = "intermediate_size", "num_key_value_heads", "sliding_window"
DEFAULTS = {  # of keys that may be absent, by model_type
    "llama": {WIDTH: 11_008},
    "mistral": {WIDTH: 14_336, KV_HEADS: 8, WINDOW: 4096, "max_position_embeddings": 2**17},
}
BIASES = ("attention_bias", "mlp_bias")
ACTIVATIONS = ("silu", "swish")  # two names of one function
FIXED = {  # the only values that are supported, beside null
    "partial_rotary_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
HARMLESS = {  # of training, generation, storage and output: they change no logit
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("_name_or_path", "tokenizer_class", "transformers_version", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_sequence_length"),
    "max_window_layers",  # of Qwen, unused without use_sliding_window
    *("attention_dropout", "chunk_size_feed_forward", "pretraining_tp", "use_cache"),
    *("id2label", "label2id", "problem_type", "return_dict"),
    *("output_attentions", "output_hidden_states", "unsloth_fixed", "unsloth_version"),
    *("architectures", "model_type"),  # checked by `_model_type`
}
MATHEMATICS = re.compile(  # in the name of a key that may change what the model computes
    "expert|softcap|clip|norm|rope|rotary|position_embedding|alibi|scal|multiplier|mup|window|bias"
    "|_act|activation|quant|lora|residual|head_dim"
)
ROPE_THETA = 10_000.0  # the default
ROPE_TYPES = {"default": "none"} | {kind: kind for kind in ROPE_SCALINGS[1:]}  # theirs: ours
ORIGINAL = "original_max_position_embeddings"
NUMBERS: dict[
    str, dict[str, tuple[str, float | None]]
] = {  # of a scaling, by its type: ours, theirs, and the default if it may be absent
    "llama3": {
        "low_frequency_factor": ("low_freq_factor", None),
        "high_frequency_factor": ("high_freq_factor", None),
    },
    "yarn": {
        "beta_fast": ("beta_fast", 32.0),
        "beta_slow": ("beta_slow", 1.0),
        "attention_factor": ("attention_factor", 0.0),
    },
}


def from_hugging_face(values: Mapping[str, Any], source: object) -> ModelConfig:
    """Return the config that a config.json describes, with the default compute dtype.

    Args:
      source: what an error calls the file.

    Raises:
      UserError: one line with every key that is not understood or has an absurd value.
    """
    model_type = _model_type(values, source)
    fields = Fields(DEFAULTS[model_type] | dict(values))
    for key, expected in FIXED.items():
        if fields.value(key, None) is not None:
            fields.require(key, expected)
    if fields.value("hidden_act", ACTIVATIONS[0]) not in ACTIVATIONS:
        fields.complain("hidden_act", f"expected {' or '.join(map(repr, ACTIVATIONS))}")
    window = _size_or_null(fields, WINDOW, 0, 2**31 - 1) if model_type == "mistral" else 0
    if model_type == "llama" and values.get(WINDOW) is not None:
        fields.complain(WINDOW, "expected null; a MistralForCausalLM has one")
    only = "sliding_attention" if window else "full_attention"
    kinds: Any = fields.value("layer_types", None) or []
    if not isinstance(kinds, list) or any(kind != only for kind in kinds):
        fields.complain("layer_types", f"expected {only!r} for each layer")
    ours: dict[str, Any] = {
        name: fields.size(key, default, largest) for key, (name, default, largest) in SIZES.items()
    }
    ours["num_kv_heads"] = _size_or_null(fields, KV_HEADS, ours["num_heads"])
    ours["hidden_dim"] = fields.size(WIDTH, 1, 2**24)
    ours["sliding_window"] = window
    for key in BIASES:
        if fields.value(key, None) is not None:
            ours[key] = fields.flag(key, False)
            if model_type == "mistral":
                fields.require(key, False)
    ours["norm_eps"] = fields.number("rms_norm_eps", 1e-6)
    ours["init_std"] = fields.number("initializer_range", 0.02)
    ours["tied_embeddings"] = fields.flag("tie_word_embeddings", False)
    head_dim = _size_or_null(fields, "head_dim", 0)
    if head_dim * ours["num_heads"] != ours["dim"]:
        ours["head_dim"] = head_dim
    ours["rope_theta"], scaling = read_rope(fields, ours["context_length"])
    if scaling.get("kind") == "dynamic":  # their context is the one that is scaled from
        factor = min(max(scaling["factor"], 1.0), 1e6)
        ours["context_length"] = int(factor * ours["context_length"])
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
    """Return the keys of a config.json; `dtype` is the name of the stored matrices' dtype.

    Raises:
      UserError: if no Llama of transformers has the model's positions, or its window and biases.
    """
    if config.position != "rope":
        raise UserError(
            f"model.position={config.position!r}: transformers' Llama has 'rope' only; choose"
            " another format"
        )
    sizes = {key: getattr(config, name) for key, (name, _, _) in SIZES.items()}
    if config.rope_scaling.kind == "dynamic":
        sizes["max_position_embeddings"] = config.rope_scaling.original_context
    biases = {key: getattr(config, key) for key in BIASES}
    if config.sliding_window and any(biases.values()):
        raise UserError(
            f"model.sliding_window={config.sliding_window} and biases: transformers has no such"
            " Llama; choose another format"
        )
    model_type = "mistral" if config.sliding_window else "llama"
    of_llama = {**biases, "pretraining_tp": 1}
    return {
        "architectures": [ARCHITECTURES[model_type][0]],
        "model_type": model_type,
        **sizes,
        WIDTH: config.ffn_dim,
        KV_HEADS: config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": ACTIVATIONS[0],
        "rms_norm_eps": config.norm_eps,
        **rope_keys(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tied_embeddings,
        **({WINDOW: config.sliding_window} if config.sliding_window else of_llama),
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
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
    message = f"{source}: {name} is not supported; expected {expected}"
    raise UserError(message, page="models.md")


def _size_or_null(fields: Fields, key: str, default: int, largest: int = 2**20) -> int:
    return default if fields.value(key, None) is None else fields.size(key, default, largest)


def read_rope(fields: Fields, context: int) -> tuple[float, dict[str, Any]]:
    """Return rope_theta, and the fields of `RopeScaling`; problems are added to `fields`.

    Files have `rope_theta` and `rope_scaling`, or `rope_parameters` with both in it; in either,
    the kind is `rope_type`, or `type` in older ones.

    Args:
      fields: of the whole config.
      context: of the model, the default of the original context.
    """
    both: dict[str, Any] = {
        key: fields.value(key, None) for key in ("rope_scaling", "rope_parameters")
    }
    given = {key: value for key, value in both.items() if value}
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        fields.complain("rope_scaling", "another one than rope_parameters; expected one of them")
    key, value = next(iter(given.items()), ("rope_scaling", {}))
    if not isinstance(value, dict):
        fields.complain(key, "expected null or an object")
        value = {}
    inner = Fields({name: each for name, each in value.items() if each is not None}, within=key)
    outside = fields.number("rope_theta", ROPE_THETA)
    theta = inner.number("rope_theta", outside)
    if "rope_theta" in fields.values and theta != outside:
        inner.complain("rope_theta", f"but rope_theta = {outside:g} outside; expected one")
    # One beside the rope settings wins, as in transformers.
    original = _size_or_null(fields, ORIGINAL, 0, 2**31 - 1)
    within = inner.size(ORIGINAL, context, 2**31 - 1)
    scaling = _read_scaling(inner, context, original or within)
    if scaling:
        inner.refuse_others()
    fields.problems += inner.problems
    return theta, scaling


def _read_scaling(inner: Fields, context: int, original: int) -> dict[str, Any]:
    kind = inner.value("rope_type", inner.value("type", "default"))
    if inner.value("type", kind) != kind:
        inner.complain("type", "another one than rope_type; expected one of them")
    inner.require("partial_rotary_factor", 1.0)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        key = "rope_type" if "rope_type" in inner.values else "type"
        inner.complain(key, f"expected one of {', '.join(ROPE_TYPES)}")
        return {}
    fields: dict[str, Any] = {"kind": ROPE_TYPES[kind]}
    if kind == "default":
        return fields
    if kind in ("llama3", "yarn", "dynamic"):
        fields["original_context"] = context if kind == "dynamic" else original
    implied = max(context / original, 1.0) if kind == "yarn" else None
    for ours, (key, default) in ({"factor": ("factor", implied)} | NUMBERS.get(kind, {})).items():
        if key not in inner.values and default is None:
            inner.complain(key, "expected a number")
        fields[ours] = inner.number(key, 1.0 if default is None else default)
    if kind == "yarn":
        fields["truncate"] = inner.flag("truncate", True)
        inner.value("finetuned", False)  # says what was done to the model
        scales = [inner.number(key, 0.0) for key in ("mscale", "mscale_all_dim")]
        if all(scales) and not fields["attention_factor"] and fields["factor"] > 1:
            one, other = (0.1 * scale * math.log(fields["factor"]) + 1 for scale in scales)
            fields["attention_factor"] = one / other if other else 0.0
    return fields


def rope_keys(theta: float, scaling: RopeScaling) -> Mapping[str, Any]:
    """Return the keys of a config in the form that every version of transformers reads."""
    keys: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": None}
    if scaling.kind == "none":
        return keys
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    for ours, (key, default) in NUMBERS.get(scaling.kind, {}).items():
        if getattr(scaling, ours) != default:
            values[key] = float(getattr(scaling, ours))
    if scaling.kind in ("llama3", "yarn"):
        values[ORIGINAL] = scaling.original_context
    if scaling.kind == "yarn" and not scaling.truncate:
        values["truncate"] = False
    return keys | {"rope_scaling": values}
