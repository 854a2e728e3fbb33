"""Meta's release folders: params.json and consolidated.NN.pth, in one to eight shards.

Llama 1, 2 and 3, Code Llama, and others with the same tensors.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.formats.json_files import write_object
from llama_jax.formats.meta import params as meta_params
from llama_jax.formats.meta import ranks
from llama_jax.formats.meta import shards as meta_shards
from llama_jax.formats.rules import export_tensors, import_tensors, make_table
from llama_jax.formats.tokenizer_files import read_tokenizer_file
from llama_jax.formats.weights import DTYPES, Weights, find_file
from llama_jax.text.tokenizer import JSON, tokenizer_file_name

TOKENIZER = "tokenizer.model"
TABLE = make_table(
    {
        "embedding": "tok_embeddings.weight",
        "blocks.{layer}.attention_norm.scale": "layers.{layer}.attention_norm.weight",
        "blocks.{layer}.attention.wq.kernel": "layers.{layer}.attention.wq.weight",
        "blocks.{layer}.attention.wk.kernel": "layers.{layer}.attention.wk.weight",
        "blocks.{layer}.attention.wv.kernel": "layers.{layer}.attention.wv.weight",
        "blocks.{layer}.attention.wo.kernel": "layers.{layer}.attention.wo.weight",
        "blocks.{layer}.ffn_norm.scale": "layers.{layer}.ffn_norm.weight",
        "blocks.{layer}.ffn.gate.kernel": "layers.{layer}.feed_forward.w1.weight",
        "blocks.{layer}.ffn.up.kernel": "layers.{layer}.feed_forward.w3.weight",
        "blocks.{layer}.ffn.down.kernel": "layers.{layer}.feed_forward.w2.weight",
        "norm.scale": "norm.weight",
        "output": "output.weight",
    },
    interleaved=True,
)
IGNORED = re.compile(  # tables that readers compute themselves
    r"rope\.freqs|layers\.[0-9]+\.attention\.(mask|inner_attention\.rope\.freqs)"
)


def read(path: Path, tokenizer: Path | None = None) -> Weights:
    """Return the model in one of Meta's folders, or in a single .pth with its params beside it.

    The params of a single NAME.pth may be called NAME.json. A model is tied if output.weight is
    absent; Meta's never are.

    Args:
      tokenizer: to use instead of the tokenizer.model in the folder, or one level up; a model
        without any gets an empty one.

    Raises:
      UserError: if shards, params.json, their tensors or the tokenizer are missing, damaged, of
        another architecture, or do not fit each other.
    """
    shards, params_file = meta_shards.find(path)
    params = meta_params.read(params_file)
    foreign = meta_shards.merged(shards, params.dim)
    foreign = {name: tensor for name, tensor in foreign.items() if not IGNORED.fullmatch(name)}
    wrong = [f"{n} of {t.dtype}" for n, t in foreign.items() if t.dtype not in DTYPES.values()]
    if wrong:
        more = f" and {len(wrong) - 1} more such tensors" if wrong[1:] else ""
        raise UserError(f"{path} holds {wrong[0]}{more}; expected {', '.join(DTYPES)}")
    config = meta_params.to_config(params, foreign, params_file)
    tensors = import_tensors(TABLE, config, foreign, path)
    folder = params_file.parent
    above = folder.resolve().parent
    found = tokenizer or find_file(folder, TOKENIZER) or find_file(above, TOKENIZER)
    model = read_tokenizer_file(found, config.vocab_size) if found else b""
    return Weights(config=config, tensors=tensors, tokenizer=model)


def write(
    weights: Weights,
    folder: Path,
    shards: int = 1,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a folder with params.json, the shards in the weights' own dtypes, and the tokenizer.

    The embedding of a tied model is written as output.weight too, since Meta's code needs both;
    `read` then returns an untied model with the same numbers.

    Args:
      shards: 1, 2, 4 or 8; one .pth each.
      report: called with the bytes of our tensors written so far.

    Raises:
      UserError: if the model does not divide into so many shards, or params.json cannot express it.
    """
    params = meta_params.from_config(weights.config)
    meta_shards.check_divisible(weights.config, shards)
    config = dataclasses.replace(weights.config, tied_embeddings=False)
    tensors = {"output": weights.tensors["embedding"], **weights.tensors}
    is_json = tokenizer_file_name(weights.tokenizer) == JSON
    tokenizer = ranks.from_json(weights.tokenizer) if is_json else weights.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / meta_shards.PARAMS, params)
    if weights.tokenizer:
        (folder / TOKENIZER).write_bytes(tokenizer)
    total = sum(tensor.nbytes for tensor in weights.tensors.values())
    foreign = export_tensors(TABLE, config, tensors)
    # What is written twice counts once.
    meta_shards.write(folder, foreign, shards, lambda done: report(min(done, total)))
