"""A float model made into one of small integers: which matrix becomes what.

Weights only: norms, activations and the cache stay as they are. Does not know files, nor how a
matrix is rounded or multiplies.
"""

from typing import Any

import jax
from flax import nnx

from llama_jax.arrangement import OutputsFirstLinear, replace_linears
from llama_jax.config import ModelConfig, require
from llama_jax.layers import Linear
from llama_jax.model import Block, Llama
from llama_jax.quantization.allocation import Groups, groups_of
from llama_jax.quantization.modules import QuantizedLinear, QuantizedTable
from llama_jax.quantization.scheme import Quantization


def quantize(model: Llama, kind: str, group_size: int = 32) -> Llama:
    """The model with its matrices as integers and its blocks as a list; the old one is untouched.

    "int8": every matrix int8 with a scale for each output. "int4": four bits with a scale and a
    lowest number for each group of inputs, but some of them int8; see `allocation`. Blocks are
    rounded one after the other: beside the old model there is never more than the new one and a
    float block. The old one's memory is free as soon as nobody holds it.

    Args:
      model: stacked or unstacked, of any floating dtype, on one device or many.
      group_size: inputs, 32 or 64, that share a scale; of "int4" only.

    Raises:
      UsageError: for another kind or group size, or a model that is quantised already.
    """
    groups = groups_of(model.config, Quantization(kind, group_size))
    require(
        isinstance(model.embedding, nnx.Param),
        "the model is quantised already; quantise the one it was made from",
    )
    blocks: Any = model.blocks
    layers, count = [], model.config.num_layers
    for index in range(count):
        block = _layer(blocks, index) if isinstance(blocks, Block) else blocks[index]
        # Waited for, or the copies of many layers would be alive at once.
        layers.append(jax.block_until_ready(_quantized_block(block, groups, index == count - 1)))
    new = _copied(model)
    new.blocks = nnx.List(layers)
    for name in ("embedding", "output"):
        if hasattr(model, name):
            table = getattr(model, name)
            made = QuantizedTable(table[...], table.shape[:1], table.axes, groups.tables)
            setattr(new, name, made)
    return new


def abstract_quantized(config: ModelConfig, kind: str, group_size: int = 32) -> Llama:
    """A quantised model with shapes in place of arrays; costs no memory."""
    return jax.eval_shape(lambda: quantize(Llama(config, rngs=nnx.Rngs(0)), kind, group_size))


def held_bytes(model: Llama) -> int:
    """Bytes that a model's arrays take, all devices together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def _copied(tree: Any) -> Any:
    """A tree that may be changed; arrays are shared."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _layer(blocks: Block, index: int) -> Block:
    """One block of stacked ones, copied."""
    return jax.tree.map(lambda array: array[index], blocks)


def _quantized_block(block: Block, groups: Groups, is_last: bool) -> Block:
    """A block with integers in every linear layer."""
    new = _copied(block)
    replace_linears(new, lambda name, layer: _quantized_linear(layer, groups.of(name, is_last)))
    return new


def _quantized_linear(layer: Linear | OutputsFirstLinear, group_size: int) -> QuantizedLinear:
    if isinstance(layer, Linear):
        layer = OutputsFirstLinear(layer)
    kernel = layer.kernel
    return QuantizedLinear(kernel[...], layer.outputs, kernel.axes, group_size)
