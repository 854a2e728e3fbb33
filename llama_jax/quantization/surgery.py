"""Quantization of a model: which matrix becomes int8 and which four bits, and the model of them.

Weights only: norms, activations and the KV cache keep their dtypes.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from llama_jax.config import ModelConfig
from llama_jax.errors import require
from llama_jax.kernels.int4 import HALF
from llama_jax.model.layers import Linear, OutputsFirstLinear
from llama_jax.model.parameters import count_parameters, matrices
from llama_jax.model.transformer import Block, Llama, replace_linears
from llama_jax.quantization.modules import QuantizedLinear, QuantizedMatrix, QuantizedTable
from llama_jax.quantization.rounding import INT8, QuantizationConfig

FLOAT32 = 4  # bytes

# Which matrices of an int4 model stay int8: as many as `INT4_BUDGET` has room for. Measured on
# small models that are int4 throughout, half of what perplexity loses comes from keys, values and
# tables; among blocks the last costs most, since nothing after it corrects its errors.
INT4_BUDGET = 0.2  # of the bytes of the float32 model
ALWAYS_INT8 = ("wk", "wv")
TABLES = ("embedding", "output")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How the matrices of each part of a model are quantized."""

    tables: QuantizationConfig
    last_block: QuantizationConfig
    blocks: QuantizationConfig

    def of(self, name: str, is_last: bool) -> QuantizationConfig:
        """Return that of a block's linear layer, such as "wq"."""
        if name in ALWAYS_INT8 and self.blocks.kind == "int4":
            return INT8
        return self.last_block if is_last else self.blocks


def allocate(config: ModelConfig, quantization: QuantizationConfig) -> Allocation:
    """Return how each part of a model of this shape is quantized."""
    chosen = Allocation(quantization, quantization, quantization)
    if quantization.kind == "int8":
        return chosen
    for part in ("tables", "last_block"):
        wider = dataclasses.replace(chosen, **{part: INT8})
        if quantized_nbytes(config, wider) <= INT4_BUDGET * FLOAT32 * count_parameters(config):
            chosen = wider
    return chosen


def quantized_nbytes(config: ModelConfig, allocation: Allocation) -> int:
    """Return the bytes of a quantized model with float32 norms, without making it."""
    total = FLOAT32 * count_parameters(config)
    for matrix in matrices(config):
        outputs, inputs = math.prod(matrix.outputs), math.prod(matrix.inputs)
        name = matrix.name.rpartition(".")[2]
        for index in range(matrix.count):
            is_last = index == matrix.count - 1
            chosen = allocation.of(name, is_last) if matrix.per_layer else allocation.tables
            total += outputs * chosen.row_nbytes(inputs) - FLOAT32 * matrix.size
    return total


def quantize(
    model: Llama,
    kind: str,
    group_size: int = 32,
    *,
    double_quantization: bool = False,
    stacked: bool = False,
) -> Llama:
    """Return the model with quantized matrices; the input is unchanged.

    "int8": every matrix int8 with a scale per output. "int4": four bits with a scale and a minimum
    per group of inputs, but some matrices int8; see `allocate`. "nf4": four bits at quantiles of
    the normal distribution, with a scale per 64 inputs; tables int8 where there is room.

    Args:
      model: stacked or unstacked, of any floating dtype, on one device or several.
      group_size: inputs, 32 or 64, that share a scale; "int4" only.
      double_quantization: quantize the scales too; "nf4" only.
      stacked: for training on top of it. The blocks of a stacked model stay stacked, all layers
        alike, and tables become floats of the compute dtype. False: blocks become a list. They are
        quantized one after the other, so that beside the old model there is never more than the new
        one and one float block.

    Raises:
      UsageError: for another kind or group size, or a model that is quantized already.
    """
    quantization = QuantizationConfig(kind, group_size, double_quantization)
    require(
        isinstance(model.embedding, nnx.Param),
        "the model is quantized already; quantize the float model it was made from",
    )
    if stacked:
        return _quantized_stacked(model, quantization)
    return _quantized(model, allocate(model.config, quantization))


def abstract_quantized(
    config: ModelConfig, kind: str, group_size: int = 32, double_quantization: bool = False
) -> Llama:
    """Return a quantized model with `jax.ShapeDtypeStruct`s in place of arrays."""
    allocation = allocate(config, QuantizationConfig(kind, group_size, double_quantization))
    # All blocks but the last are alike, so that tracing two is enough.
    shallow = dataclasses.replace(config, num_layers=min(2, config.num_layers))
    model = jax.eval_shape(lambda: _quantized(Llama(shallow, rngs=nnx.Rngs(0)), allocation))
    copies = [model.blocks[0]] * (config.num_layers - 1)
    model.blocks = nnx.List([*map(_shallow_copy, copies), model.blocks[-1]])
    model.config = config
    return model


def restack(model: Llama) -> Llama:
    """Return a model whose list of blocks is stacked, for training, if all have one structure.

    Otherwise, as where the last block is int8 and the others are int4, the model itself.
    """
    if isinstance(model.blocks, Block):
        return model
    kinds = {
        (jax.tree.structure(block), *(leaf.shape for leaf in jax.tree.leaves(block)))
        for block in model.blocks
    }
    if len(kinds) > 1:
        return model
    new = _shallow_copy(model)
    new.blocks = jax.tree.map(lambda *arrays: jnp.stack(arrays), *model.blocks)
    return new


def shard_matmuls(model: Llama) -> Llama:
    """Return a model on a mesh of whose int4 matrices each device multiplies its own shard.

    XLA partitions a matmul, but not the kernel that reads int4 on a TPU. Left to XLA are int8 and
    NF4, which have no such kernel, and a matrix whose shards are not whole blocks of inputs.
    """

    def shard(part: Any) -> Any:
        if not _is_int4(part):
            return part
        part = _shallow_copy(part)
        part.shards = _mesh_axes(part)
        return part

    return jax.tree.map(shard, model, is_leaf=_is_int4)


def _is_int4(part: Any) -> bool:
    return isinstance(part, QuantizedMatrix) and part.quantization.kind == "int4"


def _mesh_axes(matrix: QuantizedMatrix) -> tuple[Any, Any] | None:
    """Return `QuantizedMatrix.shards` by where the matrix's arrays are."""
    parts = (getattr(matrix, name) for name in ("kernel", "scale", "lowest"))
    kernel, *_ = arrays = jax.tree.leaves([*parts])
    first, *rest = map(_spec, arrays)
    outputs, *between, inputs = first
    if any(between) or any(spec != first for spec in rest):
        return None
    is_padded = 2 * kernel.shape[-1] != math.prod(matrix.inputs)
    if inputs and (is_padded or kernel.sharding.shard_shape(kernel.shape)[-1] % HALF):
        return None
    return outputs, inputs


def _spec(array: jax.Array) -> tuple[Any, ...]:
    """Return the mesh axes of each dim of an array that is placed on a mesh."""
    assert isinstance(array.sharding, NamedSharding)
    spec = array.sharding.spec
    return (*spec, *[None] * (array.ndim - len(spec)))


def model_nbytes(model: Llama) -> int:
    """Return the bytes of a model's arrays, over all devices; shapes will do."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))


def _quantized(model: Llama, allocation: Allocation) -> Llama:
    blocks: Any = model.blocks
    layers, count = [], model.config.num_layers
    for index in range(count):
        if isinstance(blocks, Block):
            block = jax.tree.map(lambda array, i=index: array[i], blocks)
        else:
            block = _shallow_copy(blocks[index])
        replace_linears(block, partial(_quantize_linear, allocation, index == count - 1))
        # Without waiting, the float copies of many layers would be alive at once.
        layers.append(jax.block_until_ready(block))
    new = _shallow_copy(model)
    new.blocks = nnx.List(layers)
    for name in TABLES:
        if hasattr(model, name):
            table = getattr(model, name)
            # A row is looked up whole: its columns are not sharded.
            axes = (table.axes[0], "")
            quantized = QuantizedTable(table[...], table.shape[:1], axes, allocation.tables)
            setattr(new, name, quantized)
    return new


def _quantized_stacked(model: Llama, quantization: QuantizationConfig) -> Llama:
    """Quantize one kind of layer after the other, each layer by layer."""
    require(isinstance(model.blocks, Block), "stacked=True needs a stacked model")
    alike = Allocation(quantization, quantization, quantization)
    dtype, new = jnp.dtype(model.config.compute_dtype), _shallow_copy(model)

    def quantize_layers(name: str, layers: Linear) -> QuantizedLinear:
        convert = partial(_quantize_linear, alike, False, name)
        return jax.block_until_ready(jax.jit(partial(jax.lax.map, convert))(layers))

    replace_linears(new.blocks, quantize_layers)
    for name in TABLES:
        if hasattr(model, name):
            table = getattr(model, name)
            setattr(new, name, table.replace(table[...].astype(dtype)))
    return new


def _quantize_linear(
    allocation: Allocation, is_last: bool, name: str, layer: Linear | OutputsFirstLinear
) -> QuantizedLinear:
    if isinstance(layer, Linear):
        layer = OutputsFirstLinear(layer)
    chosen = allocation.of(name, is_last)
    quantized = QuantizedLinear(layer.kernel[...], layer.outputs, layer.kernel.axes, chosen)
    if hasattr(layer, "bias"):
        quantized.bias = layer.bias
    return quantized


def _shallow_copy(tree: Any) -> Any:
    """Return a copy whose modules may be changed; arrays are shared."""
    return jax.tree.map(lambda leaf: leaf, tree)
