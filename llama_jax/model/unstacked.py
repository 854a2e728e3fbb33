"""The model's layout for decoding: a list of blocks, with matrices as a few rows read them fastest.

The same parameters and the same mathematics as the stacked `model.transformer.Llama`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from llama_jax.kernels.matmul import prefers_outputs_first, times_transposed
from llama_jax.model.layers import Linear
from llama_jax.model.transformer import Block, Llama


class OutputsFirstLinear(nnx.Module):
    """A `Linear` whose kernel is stored outputs first, which decoding on CPU reads faster.

    A row times such a matrix is one dot product per output, each over adjacent numbers.
    """

    def __init__(self, linear: Linear):
        self.inputs, self.outputs = linear.inputs, linear.outputs
        split, axes = len(self.inputs), linear.kernel.axes
        kernel = linear.kernel[...].reshape(math.prod(self.inputs), -1).T
        self.kernel = nnx.Param(
            kernel.reshape(self.outputs + self.inputs), axes=axes[split:] + axes[:split]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype).reshape(-1, math.prod(self.inputs))
        rows = x.shape[: x.ndim - len(self.inputs)]
        x_RI = x.reshape(-1, kernel.shape[1])
        return times_transposed(x_RI, kernel, x.dtype).reshape(rows + self.outputs)


def unstack(model: Llama) -> Llama:
    """The model with its blocks as a list, the layout that decodes fast; arrays are shared."""
    if not isinstance(model.blocks, Block):
        return model
    layers = [
        _for_decoding(jax.tree.map(lambda array, i=i: array[i], model.blocks))
        for i in range(model.config.num_layers)
    ]
    unstacked = jax.tree.map(lambda leaf: leaf, model)  # a shallow copy
    unstacked.blocks = nnx.List(layers)
    return unstacked


def _for_decoding(block: Block) -> Block:
    """A block whose matrices are laid out as this backend multiplies a few rows fastest."""
    if prefers_outputs_first():
        replace_linears(block, lambda _, layer: OutputsFirstLinear(layer))
    return block


def replace_linears(block: Block, make: Callable[[str, Any], nnx.Module]) -> None:
    """Replace each linear layer by `make(its name, itself)`."""
    for part in (block.attention, block.ffn):
        for name, layer in vars(part).items():
            if isinstance(layer, Linear | OutputsFirstLinear):
                setattr(part, name, make(name, layer))
