"""A model arranged for decoding: its blocks in a list, its matrices as few rows want them.

The same numbers and the same mathematics as the `model.Llama` it is made of.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from llama_jax.kernels.matmul import platform, times_transposed
from llama_jax.model.layers import Linear
from llama_jax.model.transformer import Block, Llama


class OutputsFirstLinear(nnx.Module):
    """The same product with its kernel stored outputs first, as decoding on CPU wants it.

    A row times such a matrix is a dot product an output, each over adjacent numbers.
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
    """The same model with its blocks as a list, the arrangement that decodes fast."""
    if not isinstance(model.blocks, Block):
        return model
    layers = [
        _arranged(jax.tree.map(lambda array, i=i: array[i], model.blocks))
        for i in range(model.config.num_layers)
    ]
    unstacked = jax.tree.map(lambda leaf: leaf, model)  # a shallow copy: arrays are shared
    unstacked.blocks = nnx.List(layers)
    return unstacked


def _arranged(block: Block) -> Block:
    """A block whose matrices lie as this backend multiplies few rows fastest."""
    if platform() != "cpu":
        return block
    replace_linears(block, lambda _, layer: OutputsFirstLinear(layer))
    return block


def replace_linears(block: Block, make: Callable[[str, Any], nnx.Module]) -> None:
    """Put what `make` returns, of its name and itself, in the place of each linear layer."""
    for part in (block.attention, block.ffn):
        for name, layer in vars(part).items():
            if isinstance(layer, Linear | OutputsFirstLinear):
                setattr(part, name, make(name, layer))
