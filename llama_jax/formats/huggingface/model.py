"""Hugging Face folders of Llama models: config.json, safetensors and tokenizer files.

Hugging Face rotates the two halves of a head together, as we do, so `wq` and `wk` need no
permutation here.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.huggingface.config import from_hugging_face, to_hugging_face
from llama_jax.formats.huggingface.safetensors import read_folder, write_folder
from llama_jax.formats.huggingface.tokenizer import read_tokenizer
from llama_jax.formats.huggingface.tokenizer_writer import write_tokenizer
from llama_jax.formats.json_files import read_object, write_object
from llama_jax.formats.prompting import read_prompting, write_prompting
from llama_jax.formats.rules import export_tensors, import_tensors, make_table
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import DTYPES, Tensor, Weights, find_file
from llama_jax.text.tokenizer import MODEL, parse_tokenizer, tokenizer_file_name

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.{layer}."
TABLE = make_table(
    {
        "embedding": EMBEDDING,
        "blocks.{layer}.attention_norm.scale": LAYER + "input_layernorm.weight",
        "blocks.{layer}.attention.wq.kernel": LAYER + "self_attn.q_proj.weight",
        "blocks.{layer}.attention.wk.kernel": LAYER + "self_attn.k_proj.weight",
        "blocks.{layer}.attention.wv.kernel": LAYER + "self_attn.v_proj.weight",
        "blocks.{layer}.attention.wo.kernel": LAYER + "self_attn.o_proj.weight",
        "blocks.{layer}.ffn_norm.scale": LAYER + "post_attention_layernorm.weight",
        "blocks.{layer}.ffn.gate.kernel": LAYER + "mlp.gate_proj.weight",
        "blocks.{layer}.ffn.up.kernel": LAYER + "mlp.up_proj.weight",
        "blocks.{layer}.ffn.down.kernel": LAYER + "mlp.down_proj.weight",
        "norm.scale": "model.norm.weight",
        "output": OUTPUT,
    },
    interleaved=False,
)
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module)\."
)  # of torch.compile and data parallelism
PREFIX = re.compile(r"(?:model\.)*(?=(embed_tokens|layers|norm|lm_head)\.)")
IGNORED = re.compile(r"(.*\.)?rotary_emb\.\w+")  # tables in old files
ADAPTER = "adapter_config.json"
CHUNK = 1024  # rows of two tables compared at a time


def read(folder: Path, tokenizer: Path | None = None) -> Weights:
    """Return the model in a folder.

    Args:
      tokenizer: a tokenizer file to use instead of the folder's own.

    Raises:
      UserError: if it is not a complete Llama, or has a config that is not understood.
    """
    path = find_file(folder, "config.json")
    if path is None and find_file(folder, ADAPTER):
        raise UserError(
            f"{folder} holds an adapter, not a model; add --merge --base with its model to merge"
            " it, or --from peft --base with a checkpoint of it to use it there"
        )
    if path is None:
        raise UserError(f"{folder} has no config.json; give a Hugging Face model's folder")
    values = read_object(path)
    config = from_hugging_face(values, path)
    tensors = _import(_plain_names(read_folder(folder), folder), config, folder)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            expected = f"expected {', '.join(DTYPES)}; convert the model to one of them"
            raise UserError(f"{folder} stores {name} as {tensor.dtype}; {expected}")
    is_full = tensors["embedding"].dtype == np.float32
    config = dataclasses.replace(config, compute_dtype="float32" if is_full else "bfloat16")
    model = read_tokenizer(folder, tokenizer, values, config.vocab_size)
    prompting = read_prompting(folder, values, model)
    return Weights(config=config, tensors=tensors, tokenizer=model, **prompting)


def _plain_names(foreign: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors by the names that transformers gives them.

    Training code leaves prefixes of wrappers in names, and `model.` is missing where the body of
    the model was saved without its head, or doubled.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in foreign.items():
        new = WRAPPERS.sub("", name)
        if match := PREFIX.match(new):
            new = ("" if match[1] == "lm_head" else "model.") + new[match.end() :]
        if new in plain:
            raise UserError(f"{folder} holds {new} twice, under names with and without a prefix")
        plain[new] = tensor
    return plain


def _import(foreign: dict[str, Tensor], config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Return our tensors; the table of a tied model may be stored under either name, or both."""
    one, other = foreign.get(EMBEDDING), foreign.get(OUTPUT)
    if config.tied_embeddings and other is not None:
        if one is not None and not _are_equal(one, other):
            raise UserError(
                f"{folder}: config.json says tie_word_embeddings, yet {OUTPUT} and {EMBEDDING}"
                " differ; set it to false"
            )
        foreign = {EMBEDDING: other} | foreign
        del foreign[OUTPUT]
    return import_tensors(
        TABLE, config, foreign, folder, lambda name: bool(IGNORED.fullmatch(name))
    )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = one.read(), other.read()
    return all(
        left[row : row + CHUNK].tobytes() == right[row : row + CHUNK].tobytes()
        for row in range(0, len(left), CHUNK)
    )


def write(
    weights: Weights,
    folder: Path,
    report: Callable[[int], None] = lambda done: None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a new folder that AutoModelForCausalLM and AutoTokenizer open.

    Args:
      report: called with the bytes of tensors written so far.
      max_shard_bytes: the tensors are written to one file, or several of at most this size.
    """
    folder.mkdir()
    config = weights.config
    write_folder(folder, export_tensors(TABLE, config, weights.tensors), max_shard_bytes, report)
    special: dict[str, Any] = {}
    if weights.tokenizer:
        tokenizer = parse_tokenizer(weights.tokenizer, folder)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        ids["pad_token_id"] = -1
        if tokenizer_file_name(weights.tokenizer) == MODEL:
            ids["pad_token_id"] = Vocabulary.from_model(weights.tokenizer).pad_id
        special = {key: token if token >= 0 else None for key, token in ids.items()}
        write_tokenizer(weights.tokenizer, weights.bos, config.context_length, folder)
    write_object(folder / "config.json", to_hugging_face(config, weights.dtype.name) | special)
    write_prompting(weights, folder)
