"""Layers that own parameters, and dropout.

Shape letters, here and in the whole package: B batch · T query length · S key length ·
D residual width · N query heads · K kv heads · G query heads per kv head · H head width ·
F feed-forward width · V vocabulary · L layers.

Every parameter is described once, where it is made: shape, initialiser and the logical `axes` of
its dims. Sharding, weight decay, checkpoints and conversion all derive from that line.
"""

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.kernels.matmul import FLOAT32, times_transposed, with_rows_of_a_tile


def parameter(
    shape: tuple[int, ...], axes: tuple[str, ...], std: float, rngs: nnx.Rngs
) -> nnx.Param[jax.Array]:
    """A float32 parameter drawn from N(0, std²), its dims named by `axes`."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """A linear map from one group of dims to another, such as [D] to [N, H], in x's dtype.

    `bias`: whether a vector, zero at first, is added to the outputs.

    The kernel keeps its dims apart for sharding and conversion; the matmul merges them. As a plain
    2-D matmul, forward and gradients run up to three times as fast on CPU as an einsum.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        std: float,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.kernel = parameter(inputs + outputs, axes, std, rngs)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32), axes=axes[len(inputs) :])

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype).reshape(math.prod(self.inputs), -1)
        rows = x.shape[: x.ndim - len(self.inputs)]
        y = with_rows_of_a_tile(jnp.matmul, x.reshape(-1, kernel.shape[0]), kernel)
        return add_bias(self, y.reshape(rows + self.outputs))


def add_bias(layer: nnx.Module, y: jax.Array) -> jax.Array:
    """`y`, whose last dims are a linear layer's outputs, plus the layer's bias if it has one."""
    if not hasattr(layer, "bias"):
        return y
    bias = layer.bias[...].astype(y.dtype)
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class OutputsFirstLinear(nnx.Module):
    """A `Linear` whose kernel is stored outputs first, which decoding on CPU reads faster.

    A row times such a matrix is one dot product per output, each over adjacent numbers.
    """

    def __init__(self, linear: Linear):
        self.inputs, self.outputs = linear.inputs, linear.outputs
        split, axes = len(self.inputs), linear.kernel.axes
        kernel_OI = linear.kernel[...].reshape(math.prod(self.inputs), -1).T
        shape = self.outputs + self.inputs
        self.kernel = nnx.Param(kernel_OI.reshape(shape), axes=axes[split:] + axes[:split])
        if hasattr(linear, "bias"):
            self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_OI = self.kernel[...].astype(x.dtype).reshape(-1, math.prod(self.inputs))
        rows = x.shape[: x.ndim - len(self.inputs)]
        x_RI = x.reshape(-1, kernel_OI.shape[1])
        y = times_transposed(x_RI, kernel_OI, x.dtype).reshape(rows + self.outputs)
        return add_bias(self, y)


class Table(Protocol):
    """An embedding table [V, D] that is no plain parameter, such as a quantised one."""

    def rows(self, ids: jax.Array, dtype: jnp.dtype, lookup: Callable[..., jax.Array]) -> jax.Array:
        """The embeddings [*ids, D] of token ids, by `Execution.lookup`."""

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """The table itself, [V, D]."""

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        """Float32 logits [R, V]."""


def embed(
    table: nnx.Param | Table,
    ids: jax.Array,
    dtype: jnp.dtype,
    lookup: Callable[..., jax.Array],
) -> jax.Array:
    """The embeddings [*ids, D] of token ids, by `Execution.lookup`."""
    if isinstance(table, nnx.Param):
        return lookup(table[...], ids, dtype)
    return table.rows(ids, dtype, lookup)


def unembed(x_RD: jax.Array, table: nnx.Param | Table) -> jax.Array:
    """Float32 logits [R, V]: the dot product of each hidden state with each row of the table."""
    if isinstance(table, nnx.Param):
        return times_transposed(x_RD, table[...].astype(x_RD.dtype), FLOAT32)
    return table(x_RD)


class RMSNorm(nnx.Module):
    """Scales vectors to unit mean square, in float32 (Zhang and Sennrich 2019).

    As in Meta's reference, the result is cast back before it is multiplied by the learned scale.
    """

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32), axes=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x_BTD.dtype)
        return normed * self.scale[...].astype(x_BTD.dtype)[None, None]


def dropout(
    x: jax.Array,
    rate: float,
    key: jax.Array | None,
    example_ids: Callable[[int], jax.Array],
    batch_dim: int = 0,
) -> jax.Array:
    """`x` with a fraction `rate` of its elements zeroed and the rest scaled up; no key: `x`.

    What is drawn for a sequence depends on its index in the whole batch, so it is the same on
    whichever device the sequence lies.

    Args:
      example_ids: see `Execution.example_ids`; called only where something is dropped.
      batch_dim: the dim of `x` that is the batch.
    """
    if key is None or rate == 0.0:
        return x
    shape = x.shape[:batch_dim] + x.shape[batch_dim + 1 :]
    draw = jax.vmap(
        lambda example: jax.random.bernoulli(jax.random.fold_in(key, example), 1.0 - rate, shape),
        out_axes=batch_dim,
    )
    return jnp.where(draw(example_ids(x.shape[batch_dim])), x / (1.0 - rate), 0.0)
