"""A float model made into one of small integers: which matrix becomes what.

Weights only: norms, activations and the cache stay as they are. Does not know files, nor how a
matrix is rounded or multiplies.
"""

from typing import Any

import jax
from flax import nnx

from llama_jax.config import ModelConfig, require
from llama_jax.layers import Linear, OutputsFirstLinear
from llama_jax.model import Block, Llama
from llama_jax.quantization.modules import QuantizedLinear, QuantizedTable

KINDS = ("int8", "int4")
GROUP_SIZES = (32, 64)
# With all in four bits, half of what perplexity loses it loses by these and by the tables, a
# fifth of the numbers.
INT8_ALWAYS = ("wk", "wv")
LARGEST_INT8_TABLES = 0.25  # of a model's numbers: more would not fit in a fifth of its memory


def quantize(model: Llama, kind: str, group_size: int = 32) -> Llama:
    """The model with its matrices as integers and its blocks as a list; the old one is untouched.

    "int8": every matrix int8 with a scale for each output. "int4": four bits with a scale and a
    lowest number for each group of inputs, but keys and values int8, and the embedding and output
    matrices too unless they are more than a quarter of the model. Blocks are rounded one after
    the other: beside the old model there is never more than the new one and a float block. The
    old one's memory is free as soon as nobody holds it.

    Args:
      model: stacked or unstacked, of any floating dtype, on one device or many.
      group_size: inputs, 32 or 64, that share a scale; of "int4" only.

    Raises:
      UsageError: for another kind or group size, or a model that is quantised already.
    """
    require(kind in KINDS, f"quantize={kind!r} is unknown; expected 'int8' or 'int4'")
    require(
        group_size in GROUP_SIZES, f"group_size={group_size} is not supported; expected 32 or 64"
    )
    require(
        isinstance(model.embedding, nnx.Param),
        "the model is quantised already; quantise the one it was made from",
    )
    groups = group_size if kind == "int4" else 0
    blocks: Any = model.blocks
    layers = []
    for index in range(model.config.num_layers):
        block = _layer(blocks, index) if isinstance(blocks, Block) else blocks[index]
        # Waited for, or the copies of many layers would be alive at once.
        layers.append(jax.block_until_ready(_quantized_block(block, groups)))
    new = _copied(model)
    new.blocks = nnx.List(layers)
    table_groups = 0 if _table_share(model.config) <= LARGEST_INT8_TABLES else groups
    for name in ("embedding", "output"):
        if hasattr(model, name):
            table = getattr(model, name)
            made = QuantizedTable(table[...], table.shape[:1], table.axes, table_groups)
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


def _quantized_block(block: Block, group_size: int) -> Block:
    """A block with integers in every linear layer."""
    new = _copied(block)
    for old_part, part in ((block.attention, new.attention), (block.ffn, new.ffn)):
        for name, layer in vars(old_part).items():
            if isinstance(layer, Linear | OutputsFirstLinear):
                size = 0 if name in INT8_ALWAYS else group_size
                setattr(part, name, _quantized_linear(layer, size))
    return new


def _quantized_linear(layer: Linear | OutputsFirstLinear, group_size: int) -> QuantizedLinear:
    if isinstance(layer, Linear):
        layer = OutputsFirstLinear(layer)
    kernel = layer.kernel
    return QuantizedLinear(kernel[...], layer.outputs, kernel.axes, group_size)


def _table_share(config: ModelConfig) -> float:
    """The part of a model's numbers that is in its embedding and output matrices."""
    tables = config.vocab_size * config.dim * (1 if config.tied_embeddings else 2)
    K, H = config.num_kv_heads, config.head_dim
    matrices = 2 * config.dim * (config.dim + K * H) + 3 * config.dim * config.ffn_dim
    return tables / (tables + config.num_layers * matrices)
