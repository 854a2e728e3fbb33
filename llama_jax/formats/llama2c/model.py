"""Models of llama2.c (karpathy/llama2.c): one file, in the three versions its exporter knows.

Version 0 is float32 with tables of cosines and sines, 1 float32 with a better header, 2 int8 with
groups. Does not know tokenizers; llama2.c keeps its own in another file, see `tokenizer_bin`.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.llama2c.header import LENGTHS, Header, pack_header, read_header
from llama_jax.formats.llama2c.int8 import (
    dequantized,
    fitting_group_size,
    quantized_bytes,
    write_quantized,
)
from llama_jax.formats.llama2c.rotary_table import rotary_table
from llama_jax.formats.rules import (
    AS_IS,
    HEADS_IN,
    INTERLEAVED,
    MATRIX,
    Layout,
    Rule,
    Table,
    expanded,
    export_tensors,
    import_tensors,
)
from llama_jax.formats.weights import DTYPES, Tensor, Weights, mapped, tensor_shapes

FLOATS_AT_ONCE = 2**21  # made float32 at a time
FINAL_NORM = "norm.weight"  # version 0 has its tables behind it


def _in_layers(ours: str, theirs: str, layout: Layout = AS_IS) -> Rule:
    return Rule(f"blocks.{{layer}}.{ours}", f"layers.{{layer}}.{theirs}.weight", layout)


EMBEDDING = Rule("embedding", "tok_embeddings.weight")
ATTENTION_NORM = _in_layers("attention_norm.scale", "attention_norm")
ATTENTION = (
    _in_layers("attention.wq.kernel", "attention.wq", INTERLEAVED),
    _in_layers("attention.wk.kernel", "attention.wk", INTERLEAVED),
    _in_layers("attention.wv.kernel", "attention.wv", MATRIX),
    _in_layers("attention.wo.kernel", "attention.wo", HEADS_IN),
)
FFN_NORM = _in_layers("ffn_norm.scale", "ffn_norm")
FFN = (
    _in_layers("ffn.gate.kernel", "feed_forward.w1", MATRIX),
    _in_layers("ffn.down.kernel", "feed_forward.w2", MATRIX),
    _in_layers("ffn.up.kernel", "feed_forward.w3", MATRIX),
)
NORM = Rule("norm.scale", FINAL_NORM)
OUTPUT = Rule("output", "output.weight")
FIRST: Table = (EMBEDDING, ATTENTION_NORM, *ATTENTION, FFN_NORM, *FFN, NORM, OUTPUT)
LATER: Table = (ATTENTION_NORM, FFN_NORM, NORM, EMBEDDING, *ATTENTION, *FFN, OUTPUT)
TABLES = (FIRST, LATER, LATER)  # by version, in the order of the file


def read(path: Path) -> Weights:
    """The model in a file, float32, without a tokenizer.

    Raises:
      UserError: if the file is not exactly as long as its header says, or is something else.
    """
    header = read_header(path)
    tensors = import_tensors(
        TABLES[header.version], header.config, dict(_foreign(path, header)), path
    )
    return Weights(config=header.config, tensors=tensors, tokenizer=b"")


def write(
    weights: Weights,
    path: Path,
    version: int = 0,
    group_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the model as a new file.

    Args:
      version: 0 for llama2.c's `run`, 2 for its `runq`; 1 holds what 0 does, for other readers.
      group_size: numbers that share a scale in version 2; see `fitting_group_size`.
      report: called with the bytes of our tensors that are written so far.

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
            _write_tensor(file, tensor, group, name)
            if version == 0 and name == FINAL_NORM:
                for rows in rotary_table(config.context_length, config.head_size):
                    file.write(rows.data)
            done += tensor.nbytes
            report(done)


def _foreign(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by their names, in the order of the file."""
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


def _write_tensor(file: BinaryIO, tensor: Tensor, group: int, name: str) -> None:
    """Append one tensor: in groups if there are any and it is a matrix, else as float32."""
    array = tensor.read()
    if group and array.ndim > 1:
        write_quantized(file, array, group, name)
        return
    flat = array.reshape(-1)
    for start in range(0, flat.size, FLOATS_AT_ONCE):
        file.write(flat[start : start + FLOATS_AT_ONCE].astype(np.float32, copy=False).data)
