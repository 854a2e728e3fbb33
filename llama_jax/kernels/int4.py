"""Matrices of small integers: what their numbers are, and how two of four bits share a byte.

Does not know how the integers were chosen, nor how such a matrix multiplies.
"""

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 64  # inputs whose four-bit integers are packed together
HALF = BLOCK // 2  # bytes that they take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix, or rows of one, as integers; the inputs lie along the last dim.

    Int8: `whole` [..., I] times `scale` [...], one for each output; `lowest` is None.
    Four bits: 0 to 15, packed in `whole` [..., P] of uint8, I padded to 2 · P; times `scale`, plus
    `lowest`, both [..., groups], one for each group of adjacent inputs.
    """

    whole: jax.Array
    scale: jax.Array
    lowest: jax.Array | None = None

    def inputs(self, start: int, length: int) -> "Quantized":
        """The matrix of some inputs only; for four bits, of whole blocks."""
        if self.lowest is None:
            return Quantized(self.whole[:, start : start + length], self.scale)
        columns = slice(start // 2, (start + length) // 2)
        size = 2 * self.whole.shape[1] // self.scale.shape[1]
        groups = slice(start // size, (start + length) // size)
        return Quantized(self.whole[:, columns], self.scale[:, groups], self.lowest[:, groups])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Integers [O, P] of some inputs, each run of P / N with its own scale and lowest number.

    Without a scale they are to be multiplied by that of their output in the end.
    """

    whole_OP: jax.Array
    scale_ON: jax.Array | None = None
    lowest_ON: jax.Array | None = None

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """The numbers [O, P]."""
        whole_OP = self.whole_OP.astype(dtype)
        if self.scale_ON is None or self.lowest_ON is None:
            return whole_OP
        scale_ON1, lowest_ON1 = (
            array.astype(dtype)[:, :, None] for array in (self.scale_ON, self.lowest_ON)
        )
        whole_ONL = whole_OP.reshape(*self.scale_ON.shape, -1)
        return (whole_ONL * scale_ON1 + lowest_ON1).reshape(whole_OP.shape)


def packed(whole: jax.Array) -> jax.Array:
    """Integers from 0 to 15, [..., I] with I a multiple of `BLOCK`, as bytes [..., I // 2].

    Byte b of each block has its input b in the low four bits and its input `HALF` + b in the high
    ones: a run of bytes is two runs of inputs, and nothing needs to be interleaved.
    """
    halves = whole.astype(jnp.uint8).reshape(*whole.shape[:-1], -1, 2, HALF)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*whole.shape[:-1], -1)


def parts(kernel: Quantized) -> list[Part]:
    """A matrix [O, I] in one part for int8, two for four bits: see `split` for their inputs."""
    if kernel.lowest is None:
        return [Part(kernel.whole)]
    low, high = kernel.whole & 15, kernel.whole & 0xF0  # the high ones stay 16-fold: no shift
    groups = kernel.scale.shape[1] * HALF // kernel.whole.shape[1]  # of a block: 1 or 2
    last = groups - 1
    scale, lowest = kernel.scale.astype(jnp.float32), kernel.lowest.astype(jnp.float32)
    return [
        Part(low, scale[:, ::groups], lowest[:, ::groups]),
        Part(high, scale[:, last::groups] / 16, lowest[:, last::groups]),
    ]


def split(x_RI: jax.Array, kernel: Quantized) -> list[jax.Array]:
    """The inputs [R, P] that go with each of `parts`."""
    if kernel.lowest is None:
        return [x_RI]
    R, P = x_RI.shape[0], kernel.whole.shape[1]
    x_RI = jnp.pad(x_RI, ((0, 0), (0, 2 * P - x_RI.shape[1])))
    x_RBsH = x_RI.reshape(R, P // HALF, 2, HALF)
    return [x_RBsH[:, :, half].reshape(R, P) for half in (0, 1)]


def floats(rows: Quantized, inputs: int, dtype: jnp.dtype) -> jax.Array:
    """The numbers [..., I] that rows of a matrix stand for."""
    if rows.lowest is None:
        return rows.whole.astype(dtype) * rows.scale.astype(dtype)[..., None]
    bytes_ = rows.whole.reshape(*rows.whole.shape[:-1], -1, HALF)
    whole = jnp.stack([bytes_ & 15, bytes_ >> 4], axis=-2)
    whole = whole.reshape(*rows.scale.shape, -1).astype(dtype)
    numbers = whole * rows.scale.astype(dtype)[..., None] + rows.lowest.astype(dtype)[..., None]
    return numbers.reshape(*rows.whole.shape[:-1], -1)[..., :inputs]
