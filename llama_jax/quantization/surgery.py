"""Quantization of a model: which matrix becomes int8 and which int4, and the model made of them.

Weights only: norms, activations and the KV cache keep their dtypes.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
from flax import nnx

from llama_jax.config import Choice, ModelConfig, require
from llama_jax.kernels.int4 import BLOCK
from llama_jax.model.layers import Linear, OutputsFirstLinear
from llama_jax.model.parameters import count_parameters, matrices
from llama_jax.model.transformer import Block, Llama, replace_linears
from llama_jax.quantization.modules import QuantizedLinear, QuantizedTable

KINDS = ("int8", "int4")
GROUP_SIZES = (32, 64)
FLOAT32 = 4  # bytes


def require_kind(kind: str) -> None:
    """Raise `UsageError` unless `kind` is one of `KINDS`."""
    Choice(KINDS).check("quantize", kind)


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How the matrices of a model are quantized.

    Raises:
      UsageError: when made with an unknown kind or an unsupported group size.
    """

    kind: str  # "int8": a scale per output; "int4": a scale and a minimum per group of inputs
    group_size: int = 32  # inputs of a group; int4 only

    def __post_init__(self) -> None:
        require_kind(self.kind)
        message = f"group_size={self.group_size} is not supported; expected 32 or 64"
        require(self.group_size in GROUP_SIZES, message)


# Which matrices of an int4 model stay int8: as many as `INT4_BUDGET` has room for. Measured on
# small models that are int4 throughout, half of what perplexity loses comes from keys, values and
# tables; among blocks the last costs most, since nothing after it corrects its errors.
INT4_BUDGET = 0.2  # of the bytes of the float32 model
ALWAYS_INT8 = ("wk", "wv")


@dataclasses.dataclass(frozen=True)
class GroupSizes:
    """Inputs per scale for the matrices of each part of a model; 0: int8, one scale per output."""

    tables: int
    last_block: int
    blocks: int

    def of(self, name: str, is_last: bool) -> int:
        """Return the group size of a block's linear layer, such as "wq"."""
        if name in ALWAYS_INT8:
            return 0
        return self.last_block if is_last else self.blocks


def allocate(config: ModelConfig, quantization: QuantizationConfig) -> GroupSizes:
    """Return the group size of each part of a model of this shape."""
    if quantization.kind == "int8":
        return GroupSizes(0, 0, 0)
    size = quantization.group_size
    chosen = GroupSizes(size, size, size)
    for part in ("tables", "last_block"):
        wider = dataclasses.replace(chosen, **{part: 0})
        if quantized_nbytes(config, wider) <= INT4_BUDGET * FLOAT32 * count_parameters(config):
            chosen = wider
    return chosen


def quantized_nbytes(config: ModelConfig, sizes: GroupSizes) -> int:
    """Return the bytes of a quantized model with float32 norms, without making it."""
    total = FLOAT32 * count_parameters(config)
    for matrix in matrices(config):
        outputs, inputs = math.prod(matrix.outputs), math.prod(matrix.inputs)
        padded = -(-inputs // BLOCK) * BLOCK
        name = matrix.name.rpartition(".")[2]
        for index in range(matrix.count):
            is_last = index == matrix.count - 1
            size = sizes.of(name, is_last) if matrix.per_layer else sizes.tables
            # Int8 has a float32 scale per output, int4 a bfloat16 scale and minimum per group.
            row = padded // 2 + 4 * padded // size if size else inputs + FLOAT32
            total += outputs * row - FLOAT32 * matrix.size
    return total


def quantize(model: Llama, kind: str, group_size: int = 32) -> Llama:
    """Return the model with quantized matrices and unstacked blocks; the input is unchanged.

    "int8": every matrix int8 with a scale per output. "int4": four bits with a scale and a minimum
    per group of inputs, but some matrices int8; see `allocate`. Blocks are quantized one after the
    other, so that beside the old model there is never more than the new one and one float block.

    Args:
      model: stacked or unstacked, of any floating dtype, on one device or several.
      group_size: inputs, 32 or 64, that share a scale; "int4" only.

    Raises:
      UsageError: for another kind or group size, or a model that is quantized already.
    """
    sizes = allocate(model.config, QuantizationConfig(kind, group_size))
    require(
        isinstance(model.embedding, nnx.Param),
        "the model is quantized already; quantize the float model it was made from",
    )
    return _quantized(model, sizes)


def abstract_quantized(config: ModelConfig, kind: str, group_size: int = 32) -> Llama:
    """Return a quantized model with `jax.ShapeDtypeStruct`s in place of arrays."""
    sizes = allocate(config, QuantizationConfig(kind, group_size))
    # All blocks but the last are alike, so that tracing two is enough.
    shallow = dataclasses.replace(config, num_layers=min(2, config.num_layers))
    model = jax.eval_shape(lambda: _quantized(Llama(shallow, rngs=nnx.Rngs(0)), sizes))
    copies = [model.blocks[0]] * (config.num_layers - 1)
    model.blocks = nnx.List([*map(_shallow_copy, copies), model.blocks[-1]])
    model.config = config
    return model


def model_nbytes(model: Llama) -> int:
    """Return the bytes of a model's arrays, over all devices; shapes will do."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def _quantized(model: Llama, sizes: GroupSizes) -> Llama:
    blocks: Any = model.blocks
    layers, count = [], model.config.num_layers
    for index in range(count):
        if isinstance(blocks, Block):
            block = jax.tree.map(lambda array, i=index: array[i], blocks)
        else:
            block = _shallow_copy(blocks[index])
        replace_linears(block, partial(_quantize_linear, sizes, index == count - 1))
        # Without waiting, the float copies of many layers would be alive at once.
        layers.append(jax.block_until_ready(block))
    new = _shallow_copy(model)
    new.blocks = nnx.List(layers)
    for name in ("embedding", "output"):
        if hasattr(model, name):
            table = getattr(model, name)
            quantized = QuantizedTable(table[...], table.shape[:1], table.axes, sizes.tables)
            setattr(new, name, quantized)
    return new


def _quantize_linear(
    sizes: GroupSizes, is_last: bool, name: str, layer: Linear | OutputsFirstLinear
) -> QuantizedLinear:
    if isinstance(layer, Linear):
        layer = OutputsFirstLinear(layer)
    size = sizes.of(name, is_last)
    quantized = QuantizedLinear(layer.kernel[...], layer.outputs, layer.kernel.axes, size)
    if hasattr(layer, "bias"):
        quantized.bias = layer.bias
    return quantized


def _shallow_copy(tree: Any) -> Any:
    """Return a copy whose modules may be changed; arrays are shared."""
    return jax.tree.map(lambda leaf: leaf, tree)
