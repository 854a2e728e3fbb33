"""Modules with int8, int4 or NF4 kernels in the places of a model's linear layers and tables.

Their arrays are parameters with logical `axes`, so shardings and checkpoints derive from them as
from float ones.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from llama_jax.kernels.int4 import Quantized
from llama_jax.kernels.matmul import FLOAT32, take_rows, times_quantized
from llama_jax.model.layers import add_bias
from llama_jax.quantization.rounding import QuantizationConfig, rounded

Dims = tuple[int, ...]
Axes = tuple[str, ...]


# The parameters of a matrix, by the names of `kernels.int4.Quantized`.
PARAMETERS = {
    "values": "kernel",
    "scale": "scale",
    "minimum": "lowest",
    "scale_step": "scale_step",
    "scale_minimum": "scale_lowest",
}


class QuantizedMatrix(nnx.Module):
    """A quantized matrix from `inputs` to `outputs`, stored outputs first.

    Int8: `kernel` [*outputs, *inputs] and `scale` [*outputs], float32. Int4: `kernel`
    [*outputs, bytes], uint8, two inputs a byte; `scale` and `lowest`, the minimum,
    [*outputs, groups], bfloat16; inputs are padded to a multiple of 64. NF4: `kernel` likewise;
    `scale` [*outputs, groups], float32, or uint8 with `scale_step` and `scale_lowest` [*outputs],
    float32.
    """

    kernel: nnx.Param[jax.Array]
    scale: nnx.Param[jax.Array]
    # Mesh axes of the first output dim and of the inputs, where each device is to multiply its own
    # shard; None: XLA partitions the matmul. See `shard_matmuls`.
    shards: tuple[Any, Any] | None = None

    def __init__(
        self, kernel: jax.Array, outputs: Dims, axes: Axes, quantization: QuantizationConfig
    ):
        """Quantize a float kernel [*outputs, *inputs]."""
        self.outputs, self.inputs = outputs, kernel.shape[len(outputs) :]
        self.quantization = quantization
        is_int8 = quantization.kind == "int8"
        for name, array in quantize_kernel(kernel, outputs, quantization).items():
            # Four bits' input dims are merged into one, which follows the first one's axis.
            axes_of = axes if is_int8 else axes[: len(outputs) + 1]
            # Never cast: integers, and scales that belong to them.
            setattr(self, name, nnx.Param(array, axes=axes_of[: array.ndim], is_exact=True))

    @property
    def is_four_bits(self) -> bool:
        """Whether two inputs share a byte."""
        return self.quantization.kind != "int8"

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """Return the dequantized kernel [*outputs, *inputs]."""
        kernel_OI = self.arrays().merged().dequantize(math.prod(self.inputs), dtype)
        return kernel_OI.reshape(self.outputs + self.inputs)

    def times(self, x_RI: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Return x · kernelᵀ, [R, O] in `dtype`."""
        if self.shards is None or jax.sharding.get_abstract_mesh().empty:
            return times_quantized(x_RI, self.arrays(), dtype)
        outputs, inputs = self.shards
        kernel_spec = PartitionSpec(outputs, *[None] * (len(self.outputs) - 1), inputs)

        def multiply(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
            y_RO = times_quantized(x_RI, kernel, dtype)
            return jax.lax.psum(y_RO, inputs) if inputs else y_RO

        return jax.shard_map(
            multiply,
            in_specs=(PartitionSpec(None, inputs), kernel_spec),
            out_specs=PartitionSpec(None, outputs),
            check_vma=False,
        )(x_RI, self.arrays())

    def arrays(self) -> Quantized:
        """Return the arrays as kernels take them."""
        found = {name: getattr(self, ours, None) for name, ours in PARAMETERS.items()}
        return Quantized(**{name: part[...] for name, part in found.items() if part is not None})


def quantize_kernel(
    kernel: jax.Array, outputs: Dims, quantization: QuantizationConfig
) -> dict[str, jax.Array]:
    """Return the arrays of a `QuantizedMatrix` by name, for a float kernel [*outputs, *inputs]."""
    found = rounded(kernel.reshape(math.prod(outputs), -1), quantization)
    arrays = {ours: getattr(found, name) for name, ours in PARAMETERS.items()}
    shapes = {name: array.shape[1:] for name, array in arrays.items() if array is not None}
    if quantization.kind == "int8":
        shapes["kernel"] = kernel.shape[len(outputs) :]
    return {name: arrays[name].reshape(outputs + shape) for name, shape in shapes.items()}


class QuantizedLinear(QuantizedMatrix):
    """A `model.layers.Linear` with a quantized kernel; the matmul runs in the dtype of x.

    A bias stays float32.
    """

    bias: nnx.Param[jax.Array]  # where the layer has one

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.shape[: x.ndim - len(self.inputs)]
        x_RI = x.reshape(-1, math.prod(self.inputs))
        y = self.times(x_RI, x.dtype).reshape(rows + self.outputs)
        return add_bias(self, y)


class QuantizedTable(QuantizedMatrix):
    """A quantized embedding or output matrix [V, D]; a tied one serves as both."""

    def rows(self, ids: jax.Array, dtype: jnp.dtype, lookup: Callable[..., jax.Array]) -> jax.Array:
        """Return the embeddings [*ids, D] of tokens."""

        def take(table: Quantized, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
            chosen = jax.tree.map(lambda array: take_rows(array, ids), table)
            return chosen.dequantize(self.inputs[0], dtype)

        return lookup(self.arrays(), ids, dtype, take)

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        """Return float32 logits [R, V]."""
        return self.times(x_RD, FLOAT32)
