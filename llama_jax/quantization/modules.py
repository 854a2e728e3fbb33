"""Modules with int8 or int4 kernels in the places of a model's linear layers and tables.

Their arrays are parameters with logical `axes`, so shardings and checkpoints derive from them as
from float ones.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.kernels.int4 import Quantized
from llama_jax.kernels.matmul import FLOAT32, times_quantized
from llama_jax.model.layers import add_bias
from llama_jax.quantization.rounding import to_int4, to_int8

Dims = tuple[int, ...]
Axes = tuple[str, ...]


class QuantizedMatrix(nnx.Module):
    """A quantized matrix from `inputs` to `outputs`, stored outputs first.

    Int8: `kernel` [*outputs, *inputs] and `scale` [*outputs], float32. Int4: `kernel`
    [*outputs, bytes], uint8, two inputs a byte; `scale` and `lowest`, the minimum,
    [*outputs, groups], bfloat16; inputs are padded to a multiple of 64.
    """

    kernel: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array]

    def __init__(self, kernel: jax.Array, outputs: Dims, axes: Axes, group_size: int):
        """Quantize a float kernel [*outputs, *inputs]; `group_size` 0: int8."""
        self.outputs, self.inputs = outputs, kernel.shape[len(outputs) :]
        output_axes, input_axes = axes[: len(outputs)], axes[len(outputs) :]
        if group_size:  # the inputs' dims are merged into one, which follows the first one's axis
            axes_of = dict.fromkeys(("kernel", "scale", "lowest"), output_axes + input_axes[:1])
        else:
            axes_of = {"kernel": axes, "scale": output_axes}
        for name, array in quantize_kernel(kernel, outputs, group_size).items():
            setattr(self, name, nnx.Param(array, axes=axes_of[name]))

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 for int8, whose scales are per output."""
        if not hasattr(self, "lowest"):
            return 0
        return 2 * self.kernel.shape[-1] // self.scale.shape[-1]

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """Return the dequantized kernel [*outputs, *inputs]."""
        kernel_OI = self.arrays().merged().dequantize(math.prod(self.inputs), dtype)
        return kernel_OI.reshape(self.outputs + self.inputs)

    def arrays(self) -> Quantized:
        """Return the arrays as kernels take them."""
        lowest = self.lowest[...] if hasattr(self, "lowest") else None
        return Quantized(self.kernel[...], self.scale[...], lowest)


def quantize_kernel(kernel: jax.Array, outputs: Dims, group_size: int) -> dict[str, jax.Array]:
    """Return the arrays of a `QuantizedMatrix` by name, for a float kernel [*outputs, *inputs]."""
    kernel_OI = kernel.reshape(math.prod(outputs), -1)
    if not group_size:
        found = to_int8(kernel_OI)
        return {"kernel": found.values.reshape(kernel.shape), "scale": found.scale.reshape(outputs)}
    found = to_int4(kernel_OI, group_size)
    arrays = {"kernel": found.values, "scale": found.scale, "lowest": found.minimum}
    return {name: array.reshape(*outputs, -1) for name, array in arrays.items()}


class QuantizedLinear(QuantizedMatrix):
    """A `model.layers.Linear` with a quantized kernel; the matmul runs in the dtype of x.

    A bias stays float32.
    """

    bias: nnx.Param[jax.Array]  # where the layer has one

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.shape[: x.ndim - len(self.inputs)]
        x_RI = x.reshape(-1, math.prod(self.inputs))
        y = times_quantized(x_RI, self.arrays(), x.dtype).reshape(rows + self.outputs)
        return add_bias(self, y)


class QuantizedTable(QuantizedMatrix):
    """A quantized embedding or output matrix [V, D]; a tied one serves as both."""

    def rows(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Return the embeddings [*ids, D] of tokens."""
        chosen = jax.tree.map(lambda array: array[ids], self.arrays())
        return chosen.dequantize(self.inputs[0], dtype)

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        """Return float32 logits [R, V]."""
        return times_quantized(x_RD, self.arrays(), FLOAT32)
