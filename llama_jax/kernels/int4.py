"""Storage of int8 and int4 matrices: their values, and how two four-bit integers share a byte."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 64  # inputs whose four-bit integers are packed together
HALF = BLOCK // 2  # bytes that they take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix, or rows of one, as integers; the inputs lie along the last dim.

    Int8: `values` [..., I] times `scale` [...], one for each output; `minimum` is None.
    Int4: 0 to 15, packed in `values` [..., P] of uint8, I padded to 2 · P; times `scale`, plus
    `minimum`, both [..., groups], one for each group of adjacent inputs.
    """

    values: jax.Array
    scale: jax.Array
    minimum: jax.Array | None = None

    def merged(self) -> "Quantized":
        """The matrix with its output dims merged into one, and for int8 its input dims too."""
        if self.minimum is None:
            O = math.prod(self.scale.shape)
            return Quantized(self.values.reshape(O, -1), self.scale.reshape(O))
        return jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), self)

    def rows(self, start: jax.Array, length: int) -> "Quantized":
        """The matrix of some adjacent outputs only."""
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length)
        return jax.tree.map(cut, self)

    def inputs(self, start: int, length: int) -> "Quantized":
        """The matrix of some inputs only; for int4, of whole blocks."""
        if self.minimum is None:
            return Quantized(self.values[:, start : start + length], self.scale)
        columns = slice(start // 2, (start + length) // 2)
        size = 2 * self.values.shape[1] // self.scale.shape[1]
        groups = slice(start // size, (start + length) // size)
        return Quantized(self.values[:, columns], self.scale[:, groups], self.minimum[:, groups])

    def dequantize(self, inputs: int, dtype: jnp.dtype) -> jax.Array:
        """The floats [..., I] that the integers stand for."""
        if self.minimum is None:
            return self.values.astype(dtype) * self.scale.astype(dtype)[..., None]
        bytes_ = self.values.reshape(*self.values.shape[:-1], -1, HALF)
        integers = jnp.stack([bytes_ & 15, bytes_ >> 4], axis=-2)
        integers = integers.reshape(*self.scale.shape, -1).astype(dtype)
        scale, minimum = (a.astype(dtype)[..., None] for a in (self.scale, self.minimum))
        return (integers * scale + minimum).reshape(*self.values.shape[:-1], -1)[..., :inputs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Integers [O, P] of some inputs, each P / N adjacent ones with a scale and a minimum.

    Without a scale, the sums of products are to be multiplied by that of their output.
    """

    values_OP: jax.Array
    scale_ON: jax.Array | None = None
    minimum_ON: jax.Array | None = None

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """The floats [O, P], but for a scale per output."""
        values_OP = self.values_OP.astype(dtype)
        if self.scale_ON is None or self.minimum_ON is None:
            return values_OP
        scale_ON1, minimum_ON1 = (
            array.astype(dtype)[:, :, None] for array in (self.scale_ON, self.minimum_ON)
        )
        values_ONL = values_OP.reshape(*self.scale_ON.shape, -1)
        return (values_ONL * scale_ON1 + minimum_ON1).reshape(values_OP.shape)


def pack(integers: jax.Array) -> jax.Array:
    """Integers from 0 to 15, [..., I] with I a multiple of `BLOCK`, as bytes [..., I // 2].

    Byte b of each block has its input b in the low four bits and its input `HALF` + b in the high
    ones: adjacent bytes are two runs of adjacent inputs, and nothing needs to be interleaved.
    """
    halves = integers.astype(jnp.uint8).reshape(*integers.shape[:-1], -1, 2, HALF)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*integers.shape[:-1], -1)


def unpack(x_RI: jax.Array, kernel: Quantized) -> list[tuple[jax.Array, Unpacked]]:
    """The operands of x · kernelᵀ: inputs [R, P] with their integers [O, P].

    One pair for int8; two for int4, of the low and of the high bits.
    """
    if kernel.minimum is None:
        return [(x_RI, halves(kernel)[0])]
    R, P = x_RI.shape[0], kernel.values.shape[1]
    x_RI = jnp.pad(x_RI, ((0, 0), (0, 2 * P - x_RI.shape[1])))
    x_RBsH = x_RI.reshape(R, P // HALF, 2, HALF)
    low, high = halves(kernel)
    return [(x_RBsH[:, :, 0].reshape(R, P), low), (x_RBsH[:, :, 1].reshape(R, P), high)]


def join(parts_RP: list[jax.Array], inputs: int) -> jax.Array:
    """[R, I] of the parts [R, P] that belong to each of `halves`; `unpack` parts its x so."""
    if len(parts_RP) == 1:
        return parts_RP[0]
    R = parts_RP[0].shape[0]
    blocks_RBH = [part_RP.reshape(R, -1, HALF) for part_RP in parts_RP]
    return jnp.stack(blocks_RBH, axis=2).reshape(R, -1)[:, :inputs]


def halves(kernel: Quantized) -> list[Unpacked]:
    """A merged kernel's integers: for int8 all of them; for int4 those of low and of high bits."""
    if kernel.minimum is None:
        return [Unpacked(kernel.values)]
    low, high = kernel.values & 15, kernel.values & 0xF0  # the high ones stay 16-fold: no shift
    groups = kernel.scale.shape[1] * HALF // kernel.values.shape[1]  # of a block: 1 or 2
    last = groups - 1
    scale, minimum = kernel.scale.astype(jnp.float32), kernel.minimum.astype(jnp.float32)
    return [
        Unpacked(low, scale[:, ::groups], minimum[:, ::groups]),
        Unpacked(high, scale[:, last::groups] / 16, minimum[:, last::groups]),
    ]
