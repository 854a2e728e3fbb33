"""Hugging Face folders of Llama models: config.json, safetensors and tokenizer files.

Knows which tensor is which. Hugging Face turns the two halves of a head together, as we do, so
`wq` and `wk` are plain matrices here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.huggingface.config import from_hugging_face, to_hugging_face
from llama_jax.formats.huggingface.files import find, read_tensors, write_tensors
from llama_jax.formats.huggingface.tokenizer import read_tokenizer
from llama_jax.formats.huggingface.tokenizer_writer import write_tokenizer
from llama_jax.formats.json_files import read_object, write_object
from llama_jax.formats.rules import HEADS_IN, MATRIX, Rule, export_tensors, import_tensors
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import DTYPES, Tensor, Weights

LAYER = "model.layers.{layer}."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TABLE = (
    Rule("embedding", EMBEDDING),
    Rule("blocks.{layer}.attention_norm.scale", LAYER + "input_layernorm.weight"),
    Rule("blocks.{layer}.attention.wq.kernel", LAYER + "self_attn.q_proj.weight", MATRIX),
    Rule("blocks.{layer}.attention.wk.kernel", LAYER + "self_attn.k_proj.weight", MATRIX),
    Rule("blocks.{layer}.attention.wv.kernel", LAYER + "self_attn.v_proj.weight", MATRIX),
    Rule("blocks.{layer}.attention.wo.kernel", LAYER + "self_attn.o_proj.weight", HEADS_IN),
    Rule("blocks.{layer}.ffn_norm.scale", LAYER + "post_attention_layernorm.weight"),
    Rule("blocks.{layer}.ffn.gate.kernel", LAYER + "mlp.gate_proj.weight", MATRIX),
    Rule("blocks.{layer}.ffn.up.kernel", LAYER + "mlp.up_proj.weight", MATRIX),
    Rule("blocks.{layer}.ffn.down.kernel", LAYER + "mlp.down_proj.weight", MATRIX),
    Rule("norm.scale", "model.norm.weight"),
    Rule("output", OUTPUT),
)
RECOMPUTED = ".rotary_emb.inv_freq"  # the end of a tensor's name in old files
ROWS_AT_ONCE = 1024  # of two tables that are compared


def read(folder: Path, tokenizer: Path | None = None) -> Weights:
    """The model in a folder.

    Args:
      tokenizer: a SentencePiece model or tokenizer.json to use instead of the folder's own.

    Raises:
      UserError: one line, if it is not a whole Llama, or says what we do not understand.
    """
    path = find(folder, "config.json")
    if path is None:
        raise UserError(f"{folder} has no config.json; give a Hugging Face model's folder")
    values = read_object(path)
    config = from_hugging_face(values, path)
    foreign = read_tensors(folder)
    tensors = _import(foreign, config, folder)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            expected = f"expected {', '.join(DTYPES)}; convert the model to one of them"
            raise UserError(f"{folder} stores {name} as {tensor.dtype}; {expected}")
    is_full = tensors["embedding"].dtype == np.float32
    config = dataclasses.replace(config, compute_dtype="float32" if is_full else "bfloat16")
    model, bos = read_tokenizer(folder, tokenizer, values, config.vocab_size)
    return Weights(config=config, tensors=tensors, tokenizer=model, bos=bos)


def _import(foreign: dict[str, Tensor], config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Our tensors. A tied model may store its one table under either name, or both."""
    either = foreign
    if config.tied_embeddings and OUTPUT in foreign:
        either = {EMBEDDING: foreign[OUTPUT]} | foreign
        del either[OUTPUT]
    tensors = import_tensors(TABLE, config, either, folder, lambda name: name.endswith(RECOMPUTED))
    if either is not foreign:
        _require_one_table(foreign, folder)
    return tensors


def _require_one_table(foreign: Mapping[str, Tensor], folder: Path) -> None:
    """`UserError` if a tied model stores both tables and they are not the same."""
    one, other = (foreign.get(name) for name in (EMBEDDING, OUTPUT))
    if one and other and not _agree(one, other):
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings, yet {OUTPUT} and {EMBEDDING} differ;"
            " set it to false"
        )


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two tables are the same, compared a part at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = one.read(), other.read()
    return all(
        left[row : row + ROWS_AT_ONCE].tobytes() == right[row : row + ROWS_AT_ONCE].tobytes()
        for row in range(0, one.shape[0], ROWS_AT_ONCE)
    )


def write(
    weights: Weights,
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
    max_shard_bytes: float = 5e9,
) -> None:
    """A new folder that AutoModelForCausalLM and AutoTokenizer open.

    Args:
      report: called with the bytes of tensors written so far.
      max_shard_bytes: the tensors go into one file, or several of at most this size.
    """
    folder.mkdir()
    config = weights.config
    tensors = export_tensors(TABLE, config, weights.tensors)
    write_tensors(folder, tensors, max_shard_bytes, report)
    special: dict[str, Any] = {}
    if weights.tokenizer:
        vocabulary = Vocabulary.from_model(weights.tokenizer)
        special = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
        special |= {"pad_token_id": vocabulary.pad_id if vocabulary.pad_id >= 0 else None}
        write_tokenizer(weights.tokenizer, weights.bos, config.context_length, folder)
    write_object(folder / "config.json", to_hugging_face(config, weights.dtype.name) | special)
    write_object(folder / "generation_config.json", special)
