"""The keys of a GGUF file that hold a model's shape, in both directions."""

import dataclasses
import math
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.gguf.header import Keys, Value
from llama_jax.model.positions import attention_factor, frequencies

SIZES = {  # ours, theirs
    "dim": "llama.embedding_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "num_kv_heads": "llama.attention.head_count_kv",
    "hidden_dim": "llama.feed_forward_length",
    "context_length": "llama.context_length",
}
VOCAB_SIZE = "llama.vocab_size"
EPS = "llama.attention.layer_norm_rms_epsilon"
THETA = "llama.rope.freq_base"
ROTATED = "llama.rope.dimension_count"
KEY_LENGTH, VALUE_LENGTH = "llama.attention.key_length", "llama.attention.value_length"
HEAD_DIMS = (ROTATED, KEY_LENGTH, VALUE_LENGTH)  # all equal the width of a head
SCALING = "llama.rope.scaling.type"
FACTOR = "llama.rope.scaling.factor"
OLD_FACTOR = "llama.rope.scale_linear"  # in files of 2023
ORIGINAL = "llama.rope.scaling.original_context_length"
BETAS = {  # ours, theirs
    "beta_fast": "llama.rope.scaling.yarn_beta_fast",
    "beta_slow": "llama.rope.scaling.yarn_beta_slow",
}
ATTENTION_FACTOR = "llama.rope.scaling.attn_factor"  # times YaRN's 0.1·ln(factor) + 1
ATTENTION_FACTORS = (ATTENTION_FACTOR, "llama.rope.scaling.yarn_attn_factor")  # both multiply
WINDOW = "llama.attention.sliding_window"
FIXED = {"llama.attention.causal": True, "llama.rope.scaling.yarn_ext_factor": 1.0}
HARMLESS = (VOCAB_SIZE, "llama.tensor_data_layout", "llama.rope.scaling.finetuned")
KNOWN = {*SIZES.values(), EPS, THETA, *HEAD_DIMS, SCALING, FACTOR, OLD_FACTOR, ORIGINAL, *HARMLESS}
KNOWN |= {*BETAS.values(), *ATTENTION_FACTORS, WINDOW}
USUAL_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2


def read_config(keys: Keys, rope_factors: np.ndarray, **others: Any) -> ModelConfig:
    """Return the config that the keys describe.

    Args:
      rope_factors: what `rope_freqs.weight` holds, float32 [H/2]; empty if there is none.
      others: fields that the tensors give, such as `vocab_size`.

    Raises:
      UserError: if keys are missing, or describe something that our model cannot do.
    """
    for key, value in keys.values.items():
        # A zero or an empty list switches a feature off.
        is_set = len(value) > 0 if isinstance(value, list | np.ndarray) else bool(value)
        if key in FIXED:
            is_set = value != FIXED[key]
        if key.startswith("llama.") and key not in KNOWN and is_set:
            unknown = f"{key} = {keys.shown(key)}, which is not Llama's"
            raise UserError(f"{keys.path} has {unknown}; convert another model")
    defaults = {"num_kv_heads": keys.get(SIZES["num_heads"], int)}
    sizes: dict[str, Any] = {
        name: keys.get(key, int, defaults.get(name)) for name, key in SIZES.items()
    }
    head_dim = keys.get(KEY_LENGTH, int, 0)
    if head_dim * sizes["num_heads"] != sizes["dim"]:
        sizes["head_dim"] = head_dim
    eps, theta = keys.get(EPS, float), keys.get(THETA, float, 10000.0)
    try:
        config = ModelConfig(
            **sizes,
            **others,
            norm_eps=eps,
            rope_theta=theta,
            sliding_window=keys.get(WINDOW, int, 0),
        )
        scaling = _read_scaling(keys, config, rope_factors)
        config = dataclasses.replace(config, rope_scaling=scaling)
    except UsageError as error:
        raise UserError(f"{keys.path} describes no Llama that can run: {error}") from error
    for key in HEAD_DIMS:
        if keys.get(key, int, config.head_size) != config.head_size:
            wrong = f"{key} = {keys.shown(key)}; expected the head dim, {config.head_size}"
            raise UserError(f"{keys.path} has {wrong}")
    return config


def config_keys(config: ModelConfig) -> dict[str, Value]:
    """Return the keys that describe a config; the scaling of Llama 3 needs a tensor as well.

    Raises:
      UserError: if llama.cpp would compute something else than the config says.
    """
    scaling, lost = config.rope_scaling, ""
    if config.position != "rope":
        lost = f"model.position={config.position!r}"
    elif 0 < config.sliding_window < config.context_length:
        lost = f"model.sliding_window={config.sliding_window}"
    elif scaling.kind == "dynamic":
        lost = f"model.rope_scaling.kind={scaling.kind!r}"
    elif scaling.kind == "yarn" and not scaling.truncate:
        lost = "model.rope_scaling.truncate=False"
    if lost:
        raise UserError(f"{lost} has no place in a GGUF file of a Llama; choose another format")
    keys: dict[str, Value] = {key: getattr(config, ours) for ours, key in SIZES.items()}
    keys |= {SIZES["hidden_dim"]: config.ffn_dim, VOCAB_SIZE: config.vocab_size}
    keys |= {ROTATED: config.head_size, EPS: config.norm_eps, THETA: float(config.rope_theta)}
    if config.head_size * config.num_heads != config.dim:
        keys |= {KEY_LENGTH: config.head_size, VALUE_LENGTH: config.head_size}
    if scaling.kind in ("linear", "yarn"):
        keys |= {SCALING: scaling.kind, FACTOR: float(scaling.factor)}
    if scaling.kind in ("llama3", "yarn"):
        keys |= {ORIGINAL: scaling.original_context}
    if scaling.kind == "yarn":
        keys |= {key: float(getattr(scaling, ours)) for ours, key in BETAS.items()}
        usual = dataclasses.replace(scaling, attention_factor=0.0)
        if scaling.attention_factor:
            keys[ATTENTION_FACTOR] = scaling.attention_factor / attention_factor(usual)
    return keys


def rope_factors(config: ModelConfig) -> np.ndarray:
    """Return what `rope_freqs.weight` holds: the divisors of the frequencies, float32 [H/2]."""
    with np.errstate(all="ignore"):  # a base beyond float32 gives NaN, which equals no factor
        plain = frequencies(config.head_size, config.rope_theta, RopeScaling())
        return plain / frequencies(config.head_size, config.rope_theta, config.rope_scaling)


def _read_scaling(keys: Keys, config: ModelConfig, factors: np.ndarray) -> RopeScaling:
    kind = keys.get(SCALING, str, "")
    factor = keys.get(FACTOR, float, keys.get(OLD_FACTOR, float, 0.0))
    if kind not in ("", "none", "linear", "yarn"):
        expected = "expected none, linear or yarn"
        raise UserError(f"{keys.path} has {SCALING} = {keys.shown(SCALING)}; {expected}")
    is_linear = kind == "linear" or (kind == "" and factor not in (0, 1))
    if factors.size and (is_linear or kind == "yarn"):
        raise UserError(f"{keys.path} scales positions twice, by {FACTOR} and by rope_freqs.weight")
    if factors.size:
        return _llama3_scaling(keys, config, factors)
    if kind == "yarn":
        return _yarn_scaling(keys, config, factor or 1.0)
    return RopeScaling(kind="linear", factor=factor or 1.0) if is_linear else RopeScaling()


def _yarn_scaling(keys: Keys, config: ModelConfig, factor: float) -> RopeScaling:
    betas = {ours: keys.get(key, float, getattr(RopeScaling, ours)) for ours, key in BETAS.items()}
    original = keys.get(ORIGINAL, int, config.context_length)
    scaling = RopeScaling(kind="yarn", factor=factor, original_context=original, **betas)
    factors = math.prod(keys.get(key, float, 1.0) for key in ATTENTION_FACTORS)
    if factors == 1:
        return scaling
    stored = float(f"{factors * attention_factor(scaling):.6g}")  # a quotient, in float32
    return dataclasses.replace(scaling, attention_factor=stored)


def _llama3_scaling(keys: Keys, config: ModelConfig, factors: np.ndarray) -> RopeScaling:
    """Return the scaling of Llama 3 that gives these factors, with its usual limits 1 and 4."""
    original = keys.get(ORIGINAL, int, RopeScaling().original_context)
    largest = float(str(factors.max()))
    for factor in (*USUAL_FACTORS, largest):
        if not 1 <= factor <= 1e6:
            continue
        scaling = RopeScaling(kind="llama3", factor=factor, original_context=original)
        expected = rope_factors(dataclasses.replace(config, rope_scaling=scaling))
        if expected.shape == factors.shape and np.allclose(factors, expected, rtol=1e-4):
            return scaling
    raise UserError(
        f"{keys.path} has rope_freqs.weight of up to {largest:g}, which is not Llama 3's rule"
        f" for a factor and a context of {original}; convert another model"
    )
