"""Llama models as GGUF files, which llama.cpp runs: every block type is read, Q8_0 is written."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as BlockType
from gguf import LlamaFileType

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.gguf.files import lazy_tensors, read_headers, write_file
from llama_jax.formats.gguf.header import Value
from llama_jax.formats.gguf.metadata import (
    config_keys,
    read_config,
    rope_factors,
)
from llama_jax.formats.gguf.vocabulary import IDS, TOKENS, adds_bos, read_tokenizer, tokenizer_keys
from llama_jax.formats.prompting import prompting_keys, read_prompting_keys
from llama_jax.formats.rules import expanded, export_tensors, import_tensors, make_table
from llama_jax.formats.tokenizer_files import fit_rows, read_tokenizer_file
from llama_jax.formats.weights import Tensor, Weights, tensor_shapes

ARCHITECTURE = "llama"
EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
BIAS = ".bias"
QUANTIZATION_VERSION = 2  # of ggml's blocks
MAX_RATIO = 1000  # of the numbers that a header describes to those that a file holds
WRITTEN = {
    "float32": (BlockType.F32, LlamaFileType.ALL_F32),
    "float16": (BlockType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (BlockType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (BlockType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


TABLE = make_table(
    {
        "embedding": EMBEDDING,
        "blocks.{layer}.attention_norm.scale": "blk.{layer}.attn_norm.weight",
        "blocks.{layer}.attention.wq.kernel": "blk.{layer}.attn_q.weight",
        "blocks.{layer}.attention.wk.kernel": "blk.{layer}.attn_k.weight",
        "blocks.{layer}.attention.wv.kernel": "blk.{layer}.attn_v.weight",
        "blocks.{layer}.attention.wo.kernel": "blk.{layer}.attn_output.weight",
        "blocks.{layer}.ffn_norm.scale": "blk.{layer}.ffn_norm.weight",
        "blocks.{layer}.ffn.gate.kernel": "blk.{layer}.ffn_gate.weight",
        "blocks.{layer}.ffn.up.kernel": "blk.{layer}.ffn_up.weight",
        "blocks.{layer}.ffn.down.kernel": "blk.{layer}.ffn_down.weight",
        "norm.scale": "output_norm.weight",
        "output": OUTPUT,
    },
    interleaved=True,
)


def read(path: Path, tokenizer: Path | None = None) -> Weights:
    """Return the model in a file, or in the files of which it is the first; blocks as float32.

    A model is untied if the file has an output matrix, even one that repeats the embedding.

    Args:
      tokenizer: to use instead of the file's own, which is not looked at then.

    Raises:
      UserError: if the file is broken, or holds something else than a Llama 2.
    """
    header = read_headers(path)
    keys = header.keys
    if (found := keys.get("general.architecture", str)) != ARCHITECTURE:
        raise UserError(
            f"{path} is a model of kind {found[:64]!r}; expected {ARCHITECTURE!r}, as which Llama,"
            " Mistral, TinyLlama, SmolLM2 and their like are stored"
        )
    if experts := keys.get("llama.expert_count", int, 0):
        raise UserError(f"{path} mixes {experts} experts, as Mixtral does; Llama has none")
    foreign = lazy_tensors(path, header.tensors)
    if EMBEDDING not in foreign:
        raise UserError(f"{path} holds no {EMBEDDING}; expected a whole model")
    factors = np.zeros(0)
    if ROPE_FACTORS in foreign:
        tensor = foreign.pop(ROPE_FACTORS)
        factors = np.array(tensor.read() if tensor.nbytes < 2**16 else np.nan, np.float32)
    embedding = foreign[EMBEDDING]
    config = read_config(
        keys,
        factors,
        vocab_size=embedding.shape[0],
        tied_embeddings=OUTPUT not in foreign,
        attention_bias=any(".attn_" in name and name.endswith(BIAS) for name in foreign),
        mlp_bias=any(".ffn_" in name and name.endswith(BIAS) for name in foreign),
        compute_dtype="float32" if embedding.dtype == np.float32 else "bfloat16",
    )
    _check_sizes(path, config, foreign)
    if config.attention_bias or config.mlp_bias:  # each of them is optional in llama.cpp
        foreign = _zero_biases(config) | foreign
    if tokenizer:
        content = read_tokenizer_file(tokenizer, config.vocab_size)
    else:
        content = read_tokenizer(keys)
    return Weights(
        config=config,
        tensors=import_tensors(TABLE, config, foreign, path),
        tokenizer=content and fit_rows(content, config.vocab_size, path),
        bos=adds_bos(keys),
        **read_prompting_keys(keys, config.vocab_size),
    )


def write(
    weights: Weights,
    path: Path,
    dtype: str = "",
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a file, tensor by tensor.

    Norm scales are always F32; rows that Q8_0's blocks do not divide are 16-bit floats. llama.cpp
    ignores what a tokenizer says of joined spaces and replaced characters.

    Args:
      path: does not exist yet.
      dtype: of the matrices, a key of `WRITTEN`; empty: that of the weights.
      report: called with the bytes of `weights` written so far, after each tensor.

    Raises:
      UserError: if the model has no tokenizer, or one without EOS, or a number does not fit.
    """
    dtype = dtype or weights.dtype.name
    if dtype not in WRITTEN:
        raise UserError(f"dtype {dtype!r} is unknown to GGUF; expected one of {', '.join(WRITTEN)}")
    kind, file_type = WRITTEN[dtype]
    keys: dict[str, Value] = {"general.name": path.stem, "general.file_type": int(file_type)}
    keys |= {"general.quantization_version": QUANTIZATION_VERSION, **config_keys(weights.config)}
    if not weights.tokenizer:
        raise UserError("GGUF holds the tokenizer and this model has none; name a --tokenizer")
    keys |= tokenizer_keys(weights.tokenizer, weights.bos)
    if (pieces := len(np.atleast_1d(keys[TOKENS]))) != weights.config.vocab_size:
        sizes = f"{pieces} pieces and the model {weights.config.vocab_size}"
        raise UserError(f"the tokenizer has {sizes}; use the one the model was trained with")
    keys |= prompting_keys(weights)
    if IDS["eos_id"] not in keys:
        raise UserError(
            "GGUF cannot hold this tokenizer: it has no EOS, in whose place readers take an id of"
            " their own; choose another format"
        )
    tensors = export_tensors(TABLE, weights.config, weights.tensors)
    if weights.config.rope_scaling.kind == "llama3":
        factors = rope_factors(weights.config)
        tensors[ROPE_FACTORS] = Tensor(factors.shape, factors.dtype, lambda: factors)
    write_file(path, ARCHITECTURE, keys, tensors, kind, report)


def _zero_biases(config: ModelConfig) -> dict[str, Tensor]:
    """Return a zero for each bias that the config has, by their names."""
    shapes = tensor_shapes(config)
    found = {}
    for rule in expanded(TABLE, config):
        if rule.theirs.endswith(BIAS):
            zero = np.zeros(rule.layout.their_shape(shapes[rule.ours]), np.float32)
            found[rule.theirs] = Tensor(zero.shape, zero.dtype, lambda zero=zero: zero)  # type: ignore[misc]
    return found


def _check_sizes(path: Path, config: ModelConfig, foreign: Mapping[str, Tensor]) -> None:
    """Refuse a config far beyond what the file holds, before anything is allocated for it."""
    heads = config.num_heads + config.num_kv_heads
    matrices = 2 * config.dim * heads * config.head_size + 3 * config.dim * config.ffn_dim
    held = sum(math.prod(tensor.shape) for tensor in foreign.values())
    if config.num_layers > len(foreign) or config.num_layers * matrices > MAX_RATIO * held:
        blocks = f"{config.num_layers:,} blocks of {matrices:,} numbers"
        message = f"describes {blocks} and holds {held:,} numbers in {len(foreign)} tensors"
        raise UserError(f"{path} {message}; copy or convert it again")
