"""Storage of int8, int4 and NF4 matrices: their values, and how two codes share a byte."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 64  # inputs whose four-bit integers are packed together
HALF = BLOCK // 2  # bytes that they take

# Quantiles of the normal distribution, scaled to -1 to 1 and with an exact 0: the 16 levels of NF4
# (Dettmers et al. 2023, "QLoRA", appendix E).
NORMAL_FLOATS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix, or rows of one, as integers; the inputs lie along the last dim.

    Int8: `values` [..., I] times `scale` [...], one for each output; the rest is None.
    Int4: 0 to 15, packed in `values` [..., P] of uint8, I padded to 2 · P; times `scale`, plus
    `minimum`, both [..., groups], one for each group of adjacent inputs.
    NF4: indices of `NORMAL_FLOATS`, packed as int4; times `scale` [..., P / 32], one for each 64
    inputs, float32. If `scale` is uint8 it is itself to be multiplied by `scale_step` [...], and
    `scale_minimum` [...] added.
    """

    values: jax.Array
    scale: jax.Array
    minimum: jax.Array | None = None
    scale_step: jax.Array | None = None
    scale_minimum: jax.Array | None = None

    @property
    def kind(self) -> str:
        """ "int8", "int4" or "nf4"."""
        if self.values.dtype == jnp.int8:
            return "int8"
        return "nf4" if self.minimum is None else "int4"

    @property
    def scales(self) -> jax.Array:
        """The scales as floats."""
        if self.scale_step is None or self.scale_minimum is None:
            return self.scale
        scale = self.scale.astype(jnp.float32)
        return scale * self.scale_step[..., None] + self.scale_minimum[..., None]

    def merged(self) -> "Quantized":
        """The matrix with its output dims merged into one, and for int8 its input dims too."""
        dims = self.scale.ndim - (self.kind != "int8")  # of the outputs

        def merge(array: jax.Array) -> jax.Array:
            O = math.prod(array.shape[:dims])
            return array.reshape(O, -1) if array.ndim > dims else array.reshape(O)

        return jax.tree.map(merge, self)

    def rows(self, start: jax.Array, length: int) -> "Quantized":
        """The matrix of some adjacent outputs only."""
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length)
        return jax.tree.map(cut, self)

    def inputs(self, start: int, length: int) -> "Quantized":
        """The matrix of some inputs only; for int4 and NF4, of whole blocks."""
        if self.kind == "int8":
            return Quantized(self.values[:, start : start + length], self.scale)
        columns = slice(start // 2, (start + length) // 2)
        size = 2 * self.values.shape[1] // self.scale.shape[1]
        groups = slice(start // size, (start + length) // size)
        minimum = None if self.minimum is None else self.minimum[:, groups]
        return dataclasses.replace(
            self, values=self.values[:, columns], scale=self.scale[:, groups], minimum=minimum
        )

    def dequantize(self, inputs: int, dtype: jnp.dtype) -> jax.Array:
        """The floats [..., I] that the integers stand for."""
        if self.kind == "int8":
            return self.values.astype(dtype) * self.scale.astype(dtype)[..., None]
        bytes_ = self.values.reshape(*self.values.shape[:-1], -1, HALF)
        if self.minimum is None:
            levels = jnp.stack([normal_floats(bytes_, 0), normal_floats(bytes_, 4)], axis=-2)
            floats = (levels.reshape(*self.scale.shape, -1) * self.scales[..., None]).astype(dtype)
        else:
            integers = jnp.stack([bytes_ & 15, bytes_ >> 4], axis=-2)
            integers = integers.reshape(*self.scale.shape, -1).astype(dtype)
            scale, minimum = (a.astype(dtype)[..., None] for a in (self.scale, self.minimum))
            floats = integers * scale + minimum
        return floats.reshape(*self.values.shape[:-1], -1)[..., :inputs]


def normal_floats(values: jax.Array, shift: int) -> jax.Array:
    """The levels of NF4, float32, whose indices are in four bits of `values`, from `shift` on.

    Selected bit by bit: a gather from the table of levels is a scalar loop on CPU.
    """
    levels = [jnp.float32(level) for level in NORMAL_FLOATS]
    for bit in range(shift, shift + 4):
        is_set = values & (1 << bit) != 0
        levels = [jnp.where(is_set, *pair) for pair in zip(levels[1::2], levels[::2])]
    return levels[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Numbers [O, P] of some inputs, each P / N adjacent ones with a scale and perhaps a minimum.

    Without a scale, the sums of products are to be multiplied by that of their output.
    """

    values_OP: jax.Array
    scale_ON: jax.Array | None = None
    minimum_ON: jax.Array | None = None

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """The floats [O, P], but for a scale per output."""
        if self.scale_ON is None:
            return self.values_OP.astype(dtype)
        shape_ONL = (*self.scale_ON.shape, -1)
        if self.minimum_ON is None:  # NF4's levels are float32
            floats_ONL = self.values_OP.reshape(shape_ONL) * self.scale_ON[:, :, None]
            return floats_ONL.reshape(self.values_OP.shape).astype(dtype)
        scale_ON1, minimum_ON1 = (
            array.astype(dtype)[:, :, None] for array in (self.scale_ON, self.minimum_ON)
        )
        values_ONL = self.values_OP.astype(dtype).reshape(shape_ONL)
        return (values_ONL * scale_ON1 + minimum_ON1).reshape(self.values_OP.shape)


def pack(integers: jax.Array) -> jax.Array:
    """Integers from 0 to 15, [..., I] with I a multiple of `BLOCK`, as bytes [..., I // 2].

    Byte b of each block has its input b in the low four bits and its input `HALF` + b in the high
    ones: adjacent bytes are two runs of adjacent inputs, and nothing needs to be interleaved.
    """
    halves = integers.astype(jnp.uint8).reshape(*integers.shape[:-1], -1, 2, HALF)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*integers.shape[:-1], -1)


def unpack(x_RI: jax.Array, kernel: Quantized) -> list[tuple[jax.Array, Unpacked]]:
    """The operands of x · kernelᵀ: inputs [R, P] with their numbers [O, P].

    One pair for int8; two for four bits, of the low and of the high ones.
    """
    if kernel.kind == "int8":
        return [(x_RI, halves(kernel)[0])]
    R, P = x_RI.shape[0], kernel.values.shape[1]
    x_RI = jnp.pad(x_RI, ((0, 0), (0, 2 * P - x_RI.shape[1])))
    x_RBsH = x_RI.reshape(R, P // HALF, 2, HALF)
    low, high = halves(kernel)
    return [(x_RBsH[:, :, 0].reshape(R, P), low), (x_RBsH[:, :, 1].reshape(R, P), high)]


def join(parts_RP: list[jax.Array], inputs: int) -> jax.Array:
    """[R, I] of the parts [R, P] that belong to each of `halves`: the reverse of `unpack` for x."""
    if len(parts_RP) == 1:
        return parts_RP[0]
    R = parts_RP[0].shape[0]
    blocks_RBH = [part_RP.reshape(R, -1, HALF) for part_RP in parts_RP]
    return jnp.stack(blocks_RBH, axis=2).reshape(R, -1)[:, :inputs]


def halves(kernel: Quantized) -> list[Unpacked]:
    """A merged kernel's numbers: all of int8's; of four bits those of the low and the high ones."""
    if kernel.kind == "int8":
        return [Unpacked(kernel.values)]
    if kernel.minimum is None:  # each block's scale is that of both its halves
        return [Unpacked(normal_floats(kernel.values, bit), kernel.scales) for bit in (0, 4)]
    low, high = kernel.values & 15, kernel.values & 0xF0  # the high ones stay 16-fold: no shift
    groups = kernel.scale.shape[1] * HALF // kernel.values.shape[1]  # of a block: 1 or 2
    last = groups - 1
    scale, minimum = kernel.scale.astype(jnp.float32), kernel.minimum.astype(jnp.float32)
    return [
        Unpacked(low, scale[:, ::groups], minimum[:, ::groups]),
        Unpacked(high, scale[:, last::groups] / 16, minimum[:, last::groups]),
    ]
