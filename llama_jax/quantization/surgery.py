"""How a model's matrices are kept in few bits: the choice alone, as flags and files tell it."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from llama_jax.config import ModelConfig, require
from llama_jax.kernels.int4 import BLOCK
from llama_jax.model.layers import Linear
from llama_jax.model.transformer import Block, Llama
from llama_jax.model.unstacked import OutputsFirstLinear, replace_linears
from llama_jax.quantization.modules import QuantizedLinear, QuantizedTable

KINDS = ("int8", "int4")
GROUP_SIZES = (32, 64)


def require_kind(kind: object) -> None:
    """`UsageError` unless it is one of `KINDS`."""
    require(kind in KINDS, f"quantize={kind!r} is unknown; expected 'int8' or 'int4'")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Matrices of integers.

    Raises:
      UsageError: when made of an unknown kind or an unsupported group size.
    """

    kind: str  # "int8", a scale for each output; or "int4", a scale and an offset for each group
    group_size: int = 32  # inputs of a group; of int4 only

    def __post_init__(self) -> None:
        require_kind(self.kind)
        require(
            self.group_size in GROUP_SIZES,
            f"group_size={self.group_size} is not supported; expected 32 or 64",
        )


# Which matrices of a model in four bits keep eight: as many as its memory has room for.
#
# Knows shapes alone. What is lost was measured on small models: with all in four bits, half of what
# perplexity loses it loses by keys, values and tables; of the blocks, most by the last, after which
# nothing makes good what went wrong.

MOST = 0.2  # of the memory that float32 takes
INT8_ALWAYS = ("wk", "wv")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Inputs that share a scale, of the matrices here and there; 0: all of an output, in int8."""

    tables: int
    last_block: int
    blocks: int

    def of(self, name: str, is_last: bool) -> int:
        """Those of a block's linear layer."""
        if name in INT8_ALWAYS:
            return 0
        return self.last_block if is_last else self.blocks


def groups_of(config: ModelConfig, quantization: Quantization) -> Groups:
    """What a model of this shape keeps in which form."""
    if quantization.kind == "int8":
        return Groups(0, 0, 0)
    size = quantization.group_size
    chosen = Groups(size, size, size)
    for name in ("tables", "last_block"):
        wider = dataclasses.replace(chosen, **{name: 0})
        if _bytes(config, wider) <= MOST * 4 * _numbers(config):
            chosen = wider
    return chosen


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a block's matrices."""
    D, F, keys = config.dim, config.ffn_dim, config.num_kv_heads * config.head_dim
    shapes = {"wq": (D, D), "wk": (keys, D), "wv": (keys, D), "wo": (D, D)}
    return shapes | {"gate": (F, D), "up": (F, D), "down": (D, F)}


def _tables(config: ModelConfig) -> int:
    return 1 if config.tied_embeddings else 2


def _norms(config: ModelConfig) -> int:
    """Numbers that stay floats."""
    return (2 * config.num_layers + 1) * config.dim


def _numbers(config: ModelConfig) -> int:
    block = sum(outputs * inputs for outputs, inputs in _shapes(config).values())
    tables = _tables(config) * config.vocab_size * config.dim
    return tables + config.num_layers * block + _norms(config)


def _bytes(config: ModelConfig, groups: Groups) -> int:
    """Bytes that a model takes whose norms are float32."""

    def block(is_last: bool) -> int:
        shapes = _shapes(config).items()
        return sum(_matrix(*shape, groups.of(name, is_last)) for name, shape in shapes)

    tables = _tables(config) * _matrix(config.vocab_size, config.dim, groups.tables)
    return tables + (config.num_layers - 1) * block(False) + block(True) + 4 * _norms(config)


def _matrix(outputs: int, inputs: int, group_size: int) -> int:
    """Bytes of a `QuantizedMatrix`."""
    if not group_size:
        return outputs * (inputs + 4)
    padded = -(-inputs // BLOCK) * BLOCK
    return outputs * (padded // 2 + 4 * padded // group_size)


# A float model made into one of small integers: which matrix becomes what.
#
# Weights only: norms, activations and the cache stay as they are. Does not know files, nor how a
# matrix is rounded or multiplies.


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
