"""The keys of a GGUF file that say what a Llama's shape is, in both directions."""

import dataclasses
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.gguf.header import Keys, Value
from llama_jax.model.positions import frequencies

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
HARMLESS = (VOCAB_SIZE, "llama.tensor_data_layout", "llama.rope.scaling.finetuned")
KNOWN = {*SIZES.values(), EPS, THETA, *HEAD_DIMS, SCALING, FACTOR, OLD_FACTOR, ORIGINAL, *HARMLESS}
USUAL_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2


def read_config(
    keys: Keys, vocab_size: int, tied: bool, compute_dtype: str, stretches: np.ndarray
) -> ModelConfig:
    """The shape that keys describe.

    Args:
      keys: of a file whose tensors give the other arguments.
      stretches: float32 [H/2], of the wavelengths of pairs; empty if there are none.

    Raises:
      UserError: if keys are missing, or say something that our model cannot do.
    """
    for key in keys.values:
        if key.startswith("llama.") and key not in KNOWN and _says_something(keys.values[key]):
            unknown = f"{key} = {keys.shown(key)}, which is not Llama 2's"
            raise UserError(f"{keys.path} has {unknown}; convert another model")
    defaults = {"num_kv_heads": keys.integer(SIZES["num_heads"])}
    sizes: dict[str, Any] = {
        name: keys.integer(key, defaults.get(name)) for name, key in SIZES.items()
    }
    head_dim = keys.integer(KEY_LENGTH, 0)
    if head_dim * sizes["num_heads"] != sizes["dim"]:
        sizes["head_dim"] = head_dim
    eps, theta = keys.number(EPS), keys.number(THETA, 10000.0)
    try:
        config = ModelConfig(
            **sizes,
            vocab_size=vocab_size,
            norm_eps=eps,
            rope_theta=theta,
            tied_embeddings=tied,
            compute_dtype=compute_dtype,
        )
        scaling = _read_scaling(keys, config, stretches)
    except UsageError as error:
        raise UserError(f"{keys.path} describes no Llama that can run: {error}") from error
    for key in HEAD_DIMS:
        if keys.integer(key, config.head_size) != config.head_size:
            wrong = f"{key} = {keys.shown(key)}; expected the head dim, {config.head_size}"
            raise UserError(f"{keys.path} has {wrong}")
    return dataclasses.replace(config, rope_scaling=scaling)


def config_keys(config: ModelConfig) -> dict[str, Value]:
    """The keys that describe a shape; wavelengths stretched as Llama 3 does are a tensor's."""
    keys: dict[str, Value] = {key: getattr(config, ours) for ours, key in SIZES.items()}
    keys |= {SIZES["hidden_dim"]: config.ffn_dim, VOCAB_SIZE: config.vocab_size}
    keys |= {ROTATED: config.head_size, EPS: config.norm_eps, THETA: float(config.rope_theta)}
    if config.head_size * config.num_heads != config.dim:
        keys |= {KEY_LENGTH: config.head_size, VALUE_LENGTH: config.head_size}
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        keys |= {SCALING: "linear", FACTOR: float(scaling.factor)}
    if scaling.kind == "llama3":
        keys |= {ORIGINAL: scaling.original_context}
    return keys


def stretches_of(config: ModelConfig) -> np.ndarray:
    """By how much the wavelength of each pair is stretched, float32 [H/2]."""
    with np.errstate(all="ignore"):  # a base beyond float32 gives no number, which matches none
        plain = frequencies(config.head_size, config.rope_theta, RopeScaling())
        return plain / frequencies(config.head_size, config.rope_theta, config.rope_scaling)


def _says_something(value: Value) -> bool:
    """Whether a value is more than a zero or an empty list, which switch things off."""
    return len(value) > 0 if isinstance(value, list | np.ndarray) else bool(value)


def _read_scaling(keys: Keys, config: ModelConfig, stretches: np.ndarray) -> RopeScaling:
    kind = keys.text(SCALING, "")
    factor = keys.number(FACTOR, keys.number(OLD_FACTOR, 0))
    if kind not in ("", "none", "linear"):
        raise UserError(f"{keys.path} has {SCALING} = {keys.shown(SCALING)}; expected linear")
    is_linear = kind == "linear" or (kind == "" and factor not in (0, 1))
    if stretches.size and is_linear:
        raise UserError(f"{keys.path} stretches wavelengths twice, by {FACTOR} and by a tensor")
    if stretches.size:
        return _recovered(keys, config, stretches)
    return RopeScaling(kind="linear", factor=factor or 1.0) if is_linear else RopeScaling()


def _recovered(keys: Keys, config: ModelConfig, stretches: np.ndarray) -> RopeScaling:
    """The rule of Llama 3 that gives these stretches; its two edges are 1 and 4 wherever used."""
    original = keys.integer(ORIGINAL, RopeScaling().original_context)
    longest = float(str(stretches.max()))
    for factor in (*USUAL_FACTORS, longest):
        if not 1 <= factor <= 1e6:
            continue
        scaling = RopeScaling(kind="llama3", factor=factor, original_context=original)
        expected = stretches_of(dataclasses.replace(config, rope_scaling=scaling))
        if expected.shape == stretches.shape and np.allclose(stretches, expected, rtol=1e-4):
            return scaling
    raise UserError(
        f"{keys.path} has rope_freqs.weight of up to {longest:g}, which is not Llama 3's rule"
        f" for a factor and a context of {original}; convert another model"
    )
