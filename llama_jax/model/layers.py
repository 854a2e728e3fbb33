"""The parts that own parameters, and dropout. They know shapes and arithmetic, nothing of Llama.

Shape letters, here and in the whole package: B batch · T query length · S key length ·
D residual width · N query heads · K kv heads · G query heads per kv head · H head width ·
F feed-forward width · V vocabulary · L layers.

Every parameter is described once, where it is made: shape, initialiser and the logical `axes` its
dims lie along. Shardings, weight decay, checkpoints and conversions all derive from that line.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.distributed.fsdp import lookup, row_numbers
from llama_jax.kernels.matmul import FLOAT32, times_transposed


def parameter(
    shape: tuple[int, ...], axes: tuple[str, ...], std: float, rngs: nnx.Rngs
) -> nnx.Param[jax.Array]:
    """A float32 parameter drawn from N(0, std²), its dims named by `axes`."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """A matrix from one group of dims to another, such as [D] to [N, H], applied in x's dtype.

    The kernel keeps its dims apart for sharding and conversion; the product merges them. As a
    plain 2-D matmul, forward and gradients run up to three times as fast on CPU as an einsum.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.kernel = parameter(inputs + outputs, axes, std, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype).reshape(math.prod(self.inputs), -1)
        rows = x.shape[: x.ndim - len(self.inputs)]
        return (x.reshape(-1, kernel.shape[0]) @ kernel).reshape(rows + self.outputs)


class Table(Protocol):
    """A table [V, D] that is no plain parameter, such as a quantised one."""

    def rows(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The rows [*ids, D] of some tokens."""

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        """Float32 logits [R, V]."""


def rows_of(table: nnx.Param | Table, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The rows [*ids, D] of a table that has one for each token."""
    if isinstance(table, nnx.Param):
        return lookup(table[...], ids, dtype)
    return table.rows(ids, dtype)


def times_table(x_RD: jax.Array, table: nnx.Param | Table) -> jax.Array:
    """Float32 logits [R, V]: how well each row of a table goes with x."""
    if isinstance(table, nnx.Param):
        return times_transposed(x_RD, table[...].astype(x_RD.dtype), FLOAT32)
    return table(x_RD)


class RMSNorm(nnx.Module):
    """Scales vectors to unit mean square, in float32 (Zhang and Sennrich 2019).

    As in Meta's reference the result is cast back before it meets the learned scale.
    """

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32), axes=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x_BTD.dtype)
        return normed * self.scale[...].astype(x_BTD.dtype)[None, None]


def dropout(x: jax.Array, rate: float, key: jax.Array | None, rows: int = 0) -> jax.Array:
    """`x` with a fraction `rate` of its elements zeroed and the rest scaled up; no key: `x`.

    Dim `rows` is the batch; what is drawn for a row depends on its number in the whole batch, not
    on which device has it.
    """
    if key is None or rate == 0.0:
        return x
    row_shape = x.shape[:rows] + x.shape[rows + 1 :]
    draw = jax.vmap(
        lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), 1.0 - rate, row_shape),
        out_axes=rows,
    )
    return jnp.where(draw(row_numbers(x.shape[rows])), x / (1.0 - rate), 0.0)
