"""Matrices of small integers in the places of a model's linear layers and tables.

They own parameters with `axes`, so shardings and checkpoints derive from them as from float ones.
Does not know which matrix of a model becomes which.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.kernels.int4 import Quantized, floats
from llama_jax.kernels.matmul import FLOAT32, times_quantized
from llama_jax.quantization.rounding import to_int4, to_int8

Dims = tuple[int, ...]
Axes = tuple[str, ...]


class QuantizedMatrix(nnx.Module):
    """A matrix from `inputs` to `outputs` whose kernel lies outputs first.

    Int8: `kernel` [*outputs, *inputs] and `scale` [*outputs], float32. Four bits: `kernel`
    [*outputs, bytes] of uint8, `scale` and `lowest` [*outputs, groups], bfloat16; inputs are
    padded to a multiple of 64.
    """

    kernel: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array]

    def __init__(self, kernel: jax.Array, outputs: Dims, axes: Axes, group_size: int):
        """Round a float kernel [*outputs, *inputs]; `group_size` 0 means int8."""
        self.outputs, self.inputs = outputs, kernel.shape[len(outputs) :]
        output_axes, input_axes = axes[: len(outputs)], axes[len(outputs) :]
        if group_size:  # merged and packed, inputs lie along the first's axis
            axes_of = dict.fromkeys(("kernel", "scale", "lowest"), output_axes + input_axes[:1])
        else:
            axes_of = {"kernel": axes, "scale": output_axes}
        for name, array in rounded(kernel, outputs, group_size).items():
            setattr(self, name, nnx.Param(array, axes=axes_of[name]))

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0: all of an output, in int8."""
        if not hasattr(self, "lowest"):
            return 0
        return 2 * self.kernel.shape[-1] // self.scale.shape[-1]

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel [*outputs, *inputs] that the integers stand for."""
        kernel_OI = floats(self.merged(), math.prod(self.inputs), dtype)
        return kernel_OI.reshape(self.outputs + self.inputs)

    def merged(self) -> Quantized:
        """The matrix [O, I] with its dims merged."""
        O = math.prod(self.outputs)
        whole = self.kernel[...].reshape(O, -1)
        if not hasattr(self, "lowest"):
            return Quantized(whole, self.scale[...].reshape(O))
        return Quantized(whole, *(a[...].reshape(O, -1) for a in (self.scale, self.lowest)))


def rounded(kernel: jax.Array, outputs: Dims, group_size: int) -> dict[str, jax.Array]:
    """The arrays of a `QuantizedMatrix` by name, of a float kernel [*outputs, *inputs]."""
    kernel_OI = kernel.reshape(math.prod(outputs), -1)
    if not group_size:
        found = to_int8(kernel_OI)
        return {"kernel": found.whole.reshape(kernel.shape), "scale": found.scale.reshape(outputs)}
    found = to_int4(kernel_OI, group_size)
    arrays = {"kernel": found.whole, "scale": found.scale, "lowest": found.lowest}
    return {name: array.reshape(*outputs, -1) for name, array in arrays.items()}


class QuantizedLinear(QuantizedMatrix):
    """`layers.Linear` with integers for its kernel: the same face, applied in x's dtype."""

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.shape[: x.ndim - len(self.inputs)]
        x_RI = x.reshape(-1, math.prod(self.inputs))
        return times_quantized(x_RI, self.merged(), x.dtype).reshape(rows + self.outputs)


class QuantizedTable(QuantizedMatrix):
    """A table [V, D] with a row for each token; tied, it serves embeddings and logits both."""

    def rows(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The rows [*ids, D] of some tokens."""
        whole = self.merged()
        chosen = jax.tree.map(lambda array: array[ids], whole)
        return floats(chosen, self.inputs[0], dtype)

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        """Float32 logits [R, V]."""
        return times_quantized(x_RD, self.merged(), FLOAT32)
