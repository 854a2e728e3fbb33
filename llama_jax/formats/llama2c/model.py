"""Model files of llama2.c (karpathy/llama2.c), in the three versions that its exporter writes.

Version 0 is float32 with tables of cosines and sines, 1 float32 with a longer header, 2 int8 in
groups. The tokenizer is another file, see `llama2c.tokenizer`. The ckpt.pt of its train.py is read
too.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.llama2c import training_checkpoint
from llama_jax.formats.llama2c.header import LENGTHS, Header, pack_header, read_header
from llama_jax.formats.llama2c.int8 import (
    dequantized,
    fitting_group_size,
    quantized_bytes,
    write_quantized,
)
from llama_jax.formats.rules import expanded, export_tensors, import_tensors, make_table
from llama_jax.formats.tokenizer_files import read_tokenizer_file
from llama_jax.formats.weights import DTYPES, Tensor, Weights, mapped, tensor_shapes

CHUNK = 2**21  # numbers converted to float32 at a time
FINAL_NORM = "norm.weight"  # the tables of version 0 follow it
BLOCK = "blocks.{layer}."
EMBEDDING = {"embedding": "tok_embeddings.weight"}
ATTENTION_NORM = {BLOCK + "attention_norm.scale": "layers.{layer}.attention_norm.weight"}
ATTENTION = {
    BLOCK + f"attention.{name}.kernel": f"layers.{{layer}}.attention.{name}.weight"
    for name in ("wq", "wk", "wv", "wo")
}
FFN_NORM = {BLOCK + "ffn_norm.scale": "layers.{layer}.ffn_norm.weight"}
FFN = {
    BLOCK + f"ffn.{ours}.kernel": f"layers.{{layer}}.feed_forward.{theirs}.weight"
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
NORM, OUTPUT = {"norm.scale": FINAL_NORM}, {"output": "output.weight"}
FIRST = EMBEDDING | ATTENTION_NORM | ATTENTION | FFN_NORM | FFN | NORM | OUTPUT
LATER = ATTENTION_NORM | FFN_NORM | NORM | EMBEDDING | ATTENTION | FFN | OUTPUT
TABLES = [  # by version, in the order of the file
    make_table(names, interleaved=True) for names in (FIRST, LATER, LATER)
]


def read(path: Path, tokenizer: Path | None = None) -> Weights:
    """Return the model in a file: float32, or a training checkpoint's dtypes.

    Args:
      tokenizer: its tokenizer file, since a model's file holds none.

    Raises:
      UserError: if the file is not exactly as long as its header says, or is something else.
    """
    if path.suffix == ".pt":
        config, saved = training_checkpoint.read(path)
        version, foreign = 0, saved
    else:
        header = read_header(path)
        version, config, foreign = header.version, header.config, dict(_foreign(path, header))
    tensors = import_tensors(TABLES[version], config, foreign, path)
    content = read_tokenizer_file(tokenizer, config.vocab_size) if tokenizer else b""
    return Weights(config=config, tensors=tensors, tokenizer=content)


def write(
    weights: Weights,
    path: Path,
    version: int = 0,
    group_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the model as a new file.

    Args:
      version: 0 for llama2.c's `run`, 2 for its `runq`; 1 has the content of 0, for other readers.
      group_size: numbers that share a scale in version 2; see `fitting_group_size`.
      report: called with the bytes of our tensors written so far.

    Raises:
      UserError: if llama2.c cannot express the model, or version 2 a number in it.
    """
    if version not in range(len(TABLES)):
        raise UserError(f"llama2.c has no version {version}; choose 0, 1 or 2")
    config, done = weights.config, 0
    group = fitting_group_size(config, group_size) if version == 2 else 0
    header = pack_header(config, version, group)
    foreign = export_tensors(TABLES[version], config, weights.tensors)
    with path.open("xb") as file:
        file.write(header)
        for name, tensor in foreign.items():
            _write_tensor(file, tensor.read(), group, name)
            if version == 0 and name == FINAL_NORM:
                _write_rotary_tables(file, config.context_length, config.head_size)
            report(done := done + tensor.nbytes)


def _foreign(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield their tensors by their names, in the order of the file."""
    config, group = header.config, header.group_size
    ours, offset = tensor_shapes(config), LENGTHS[header.version]
    for rule in expanded(TABLES[header.version], config):
        shape = rule.layout.their_shape(ours[rule.ours])
        if header.version == 2 and len(shape) > 1:  # norms stay float32
            yield rule.theirs, dequantized(path, offset, shape, group)
            offset += quantized_bytes(math.prod(shape), group)
        else:
            yield rule.theirs, mapped(path, offset, shape, DTYPES["float32"])
            offset += 4 * math.prod(shape)
        if header.version == 0 and rule.theirs == FINAL_NORM:
            offset += 4 * config.context_length * config.head_size


def _write_tensor(file: BinaryIO, array: np.ndarray, group: int, name: str) -> None:
    """Append one tensor: in groups if there are any and it is a matrix, else as float32."""
    if group and array.ndim > 1:
        write_quantized(file, array, group, name)
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        file.write(flat[start : start + CHUNK].astype(np.float32, copy=False).data)


def _write_rotary_tables(file: BinaryIO, context_length: int, head_dim: int) -> None:
    """Append the cosines [S, H/2] and then the sines [S, H/2], in float32.

    Every reader skips them and computes its own. They may differ in the last bits from those that
    llama2.c's exporter writes, which come from PyTorch's cosine.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(10000.0) ** exponents
    rows = 4096
    for function in (np.cos, np.sin):
        for start in range(0, context_length, rows):
            positions = np.arange(start, min(start + rows, context_length), dtype=np.float32)
            file.write(function(np.outer(positions, frequencies)).data)
