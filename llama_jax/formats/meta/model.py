"""Meta's release folders: params.json and consolidated.NN.pth, in one to eight shards.

Llama 1, Llama 2 and Code Llama, and others of the same tensors. The shards are `meta_shards`'s,
params.json is `meta_params`'s; here are the rules.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.formats.meta import params as meta_params
from llama_jax.formats.meta import shards as meta_shards
from llama_jax.formats.rules import (
    AS_IS,
    HEADS_IN,
    INTERLEAVED,
    MATRIX,
    Rule,
    export_tensors,
    import_tensors,
)
from llama_jax.formats.weights import DTYPES, Tensor, Weights
from llama_jax.text.tokenizer import Tokenizer, read_model

TOKENIZER = "tokenizer.model"
LAYER = "layers.{layer}"
TABLE = (
    Rule("embedding", "tok_embeddings.weight"),
    Rule("blocks.{layer}.attention_norm.scale", f"{LAYER}.attention_norm.weight"),
    Rule("blocks.{layer}.attention.wq.kernel", f"{LAYER}.attention.wq.weight", INTERLEAVED),
    Rule("blocks.{layer}.attention.wk.kernel", f"{LAYER}.attention.wk.weight", INTERLEAVED),
    Rule("blocks.{layer}.attention.wv.kernel", f"{LAYER}.attention.wv.weight", MATRIX),
    Rule("blocks.{layer}.attention.wo.kernel", f"{LAYER}.attention.wo.weight", HEADS_IN),
    Rule("blocks.{layer}.ffn_norm.scale", f"{LAYER}.ffn_norm.weight"),
    Rule("blocks.{layer}.ffn.gate.kernel", f"{LAYER}.feed_forward.w1.weight", MATRIX),
    Rule("blocks.{layer}.ffn.up.kernel", f"{LAYER}.feed_forward.w3.weight", MATRIX),
    Rule("blocks.{layer}.ffn.down.kernel", f"{LAYER}.feed_forward.w2.weight", MATRIX),
    Rule("norm.scale", "norm.weight"),
    Rule("output", "output.weight", AS_IS),
)
IGNORED = re.compile(  # tables that everybody computes anew
    r"rope\.freqs|layers\.[0-9]+\.attention\.(mask|inner_attention\.rope\.freqs)"
)


def read(path: Path, tokenizer: Path | None = None) -> Weights:
    """The model in one of Meta's folders, or in a single .pth with its params.json beside it.

    The params of a single NAME.pth may also be called NAME.json. A model is tied where
    output.weight is absent; Meta's never are. The tokenizer is the one given, or the
    tokenizer.model in the folder, or one level up; the model has none (b"") if there is none.

    Raises:
      UserError: one line if shards, params.json, their tensors or the tokenizer are missing,
        damaged, of another architecture, or do not fit each other.
    """
    shards, params_file = meta_shards.find(path)
    params = meta_params.parsed(params_file)
    foreign = meta_shards.merged(shards, params.dim)
    foreign = {name: tensor for name, tensor in foreign.items() if not IGNORED.fullmatch(name)}
    _require_floats(path, foreign)
    config = meta_params.to_config(params, foreign, params_file)
    tensors = import_tensors(TABLE, config, foreign, path)
    folder = params_file.parent
    return Weights(
        config=config, tensors=tensors, tokenizer=_tokenizer(folder, tokenizer, config.vocab_size)
    )


def write(
    weights: Weights,
    folder: Path,
    shards: int = 1,
    report: Callable[[int], None] = lambda bytes_done: None,
) -> None:
    """Make `folder` with params.json, the shards in the weights' own dtypes, and the tokenizer.

    The embedding of a tied model is written twice, as output.weight too, since Meta's code wants
    both; `read` therefore gives back an untied model of the same numbers.

    Args:
      shards: 1, 2, 4 or 8; one .pth each.
      report: told the bytes of our tensors written so far.

    Raises:
      UserError: if the model does not cut into so many shards or Meta has no word for a choice of
        its config.
    """
    params = meta_params.from_config(weights.config)
    meta_shards.require_divisible(weights.config, shards)
    config = dataclasses.replace(weights.config, tied_embeddings=False)
    tensors = {"output": weights.tensors["embedding"], **weights.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    meta_params.write(params, folder)
    if weights.tokenizer:
        (folder / TOKENIZER).write_bytes(weights.tokenizer)
    total = sum(tensor.nbytes for tensor in weights.tensors.values())
    meta_shards.write(
        folder,
        export_tensors(TABLE, config, tensors),
        shards,
        lambda done: report(min(done, total)),  # what is written twice counts once
    )


def _require_floats(path: Path, foreign: dict[str, Tensor]) -> None:
    wrong = [f"{n} of {t.dtype}" for n, t in foreign.items() if t.dtype not in DTYPES.values()]
    if wrong:
        raise UserError(
            f"{path} holds {wrong[0]} and {len(wrong) - 1} more such tensors; expected"
            f" {', '.join(DTYPES)}"
        )


def _tokenizer(folder: Path, given: Path | None, vocab_size: int) -> bytes:
    """The bytes of the tokenizer of a folder's model, checked to have the model's vocabulary."""
    places = [given] if given else [folder / TOKENIZER, folder.resolve().parent / TOKENIZER]
    found = next((place for place in places if given or place.exists()), None)
    if found is None:
        return b""
    pieces = Tokenizer(found).vocab_size
    if pieces != vocab_size:
        raise UserError(
            f"tokenizer {found} has {pieces:,} pieces but the model has {vocab_size:,}; name the"
            " model's own with --tokenizer"
        )
    return read_model(found)
