"""The config.json of a Hugging Face Llama and our `ModelConfig`, in both directions.

Every key is understood, or known to change nothing, or refused by name: one that is silently
ignored would give a model that runs and is wrong. Absent keys mean what they mean to
`transformers.LlamaConfig`. Does not know tensors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.hugging_face_rope import read_rope, rope_keys
from llama_jax.formats.json_fields import Fields
from llama_jax.formats.json_object import shown

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
    if head_dim and head_dim * ours["num_heads"] != ours["dim"]:
        fields.complain("head_dim", f"expected {ours['dim']} / {ours['num_heads']} heads")
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
        "head_dim": config.head_dim,
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
