"""Rounding of float matrices [O, I] to int8, int4 and NF4, from their own values alone."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp

from llama_jax.config import Choice
from llama_jax.errors import require
from llama_jax.kernels.int4 import BLOCK, NORMAL_FLOATS, Quantized, pack

KINDS = ("int8", "int4", "nf4")
GROUP_SIZES = (32, 64)
INT4_MAX = 15
RANGE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range, tried as that of its integers
REFITS = 2  # least-squares fits after each
AT_ONCE = 2**18  # numbers rounded together: 4 times as fast while they stay in a core's cache


def require_kind(kind: str) -> None:
    """Raise `UsageError` unless `kind` is one of `KINDS`."""
    Choice(KINDS).check("quantize", kind)


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a matrix, or those of a model, are quantized.

    Raises:
      UsageError: when made with an unknown kind or an unsupported group size.
    """

    kind: str  # "int8": a scale per output; "int4": a scale and a minimum per group of inputs;
    # "nf4": the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023), a scale per 64 inputs
    group_size: int = 32  # inputs of a group; int4 only
    double_quantization: bool = False  # whether scales are 8-bit integers; nf4 only

    def __post_init__(self) -> None:
        require_kind(self.kind)
        message = f"group_size={self.group_size} is not supported; expected 32 or 64"
        require(self.group_size in GROUP_SIZES, message)

    def row_nbytes(self, inputs: int) -> int:
        """Return the bytes of one output's integers and scales."""
        padded = -(-inputs // BLOCK) * BLOCK
        if self.kind == "int8":  # a float32 scale
            return inputs + 4
        if self.kind == "int4":  # a bfloat16 scale and minimum per group
            return padded // 2 + 4 * padded // self.group_size
        blocks = padded // BLOCK  # float32 scales, or bytes with a float32 scale and minimum
        return padded // 2 + (blocks + 8 if self.double_quantization else 4 * blocks)


INT8 = QuantizationConfig("int8")


def rounded(kernel_OI: jax.Array, quantization: QuantizationConfig) -> Quantized:
    """Return a float matrix as its kind of integers."""
    if quantization.kind == "int8":
        return to_int8(kernel_OI)
    if quantization.kind == "int4":
        return to_int4(kernel_OI, quantization.group_size)
    return to_nf4(kernel_OI, quantization.double_quantization)


@jax.jit
def to_int8(kernel_OI: jax.Array) -> Quantized:
    """Return integers from -127 to 127 and a float32 scale per output, its largest |w| / 127."""
    wide_OI = kernel_OI.astype(jnp.float32)
    scale_O = jnp.max(jnp.abs(wide_OI), axis=1) / 127
    whole_OI = jnp.round(wide_OI / _nonzero(scale_O)[:, None])
    return Quantized(whole_OI.astype(jnp.int8), scale_O)


@partial(jax.jit, static_argnames="group_size")
def to_int4(kernel_OI: jax.Array, group_size: int) -> Quantized:
    """Return integers from 0 to 15, and a bfloat16 scale and minimum per group of adjacent inputs.

    Several pairs of scale and minimum are tried, and the one with the least squared error is kept:
    each starts from a fraction of the group's range, and is then refitted by least squares to the
    integers that it rounds to.
    """

    return _by_rows(partial(_to_int4, group_size=group_size), kernel_OI)


@partial(jax.jit, static_argnames="double_quantization")
def to_nf4(kernel_OI: jax.Array, double_quantization: bool = False) -> Quantized:
    """Return NormalFloat codes from 0 to 15, and a scale per 64 adjacent inputs, the largest |w|.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; codes and
    scales are those of bitsandbytes. With `double_quantization`, a row's scales are rounded to 256
    equally spaced numbers from its least to its largest, where bitsandbytes' are unequally spaced
    and shared by 256 scales.
    """
    found = _by_rows(_to_nf4, kernel_OI)
    if not double_quantization:
        return found
    minimum_O, max_O = found.scale.min(axis=1), found.scale.max(axis=1)
    step_O = (max_O - minimum_O) / 255
    bytes_OG = jnp.round((found.scale - minimum_O[:, None]) / _nonzero(step_O)[:, None])
    return dataclasses.replace(
        found, scale=bytes_OG.astype(jnp.uint8), scale_step=step_O, scale_minimum=minimum_O
    )


def _by_rows(convert: Callable[[jax.Array], Quantized], kernel_OI: jax.Array) -> Quantized:
    """Return `convert(kernel_OI)`, made of some rows at a time."""

    def of_row(row_I: jax.Array) -> Quantized:
        return jax.tree.map(lambda array: array[0], convert(row_I[None]))

    O, I = kernel_OI.shape
    return jax.lax.map(of_row, kernel_OI, batch_size=min(O, max(1, AT_ONCE // I)))


def _to_nf4(kernel_OI: jax.Array) -> Quantized:
    O, I = kernel_OI.shape
    wide_OI = jnp.pad(kernel_OI.astype(jnp.float32), ((0, 0), (0, -I % BLOCK)))
    w_OGI = wide_OI.reshape(O, -1, BLOCK)
    scale_OG = jnp.max(jnp.abs(w_OGI), axis=-1)
    unit_OGI = w_OGI / _nonzero(scale_OG)[:, :, None]
    # The nearest level: how many midpoints between adjacent levels are exceeded.
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(NORMAL_FLOATS)]
    above = [(unit_OGI > midpoint).astype(jnp.uint8) for midpoint in midpoints]
    codes_OGI = reduce(jnp.add, above)
    return Quantized(pack(codes_OGI.reshape(O, -1)), scale_OG)


def _to_int4(kernel_OI: jax.Array, group_size: int) -> Quantized:
    O, I = kernel_OI.shape
    wide_OI = kernel_OI.astype(jnp.float32)
    # Padded with the last value, which widens no group's range.
    wide_OI = jnp.pad(wide_OI, ((0, 0), (0, -I % BLOCK)), mode="edge")
    w_OGI = wide_OI.reshape(O, -1, group_size)
    max_OG, min_OG = w_OGI.max(axis=-1), w_OGI.min(axis=-1)
    middle_OG, range_OG = (max_OG + min_OG) / 2, max_OG - min_OG

    def attempt(best: Fit, fraction: jax.Array) -> tuple[Fit, None]:
        scale_OG = range_OG * (fraction / INT4_MAX)
        fit = (scale_OG, middle_OG - scale_OG * (INT4_MAX / 2))
        for _ in range(REFITS + 1):
            stored = fit[0].astype(jnp.bfloat16), fit[1].astype(jnp.bfloat16)
            integers_OGI = _integers(w_OGI, *stored)
            scale_OG1, minimum_OG1 = (x_OG.astype(jnp.float32)[:, :, None] for x_OG in stored)
            found_OGI = integers_OGI * scale_OG1 + minimum_OG1
            error_OG = jnp.sum(jnp.square(w_OGI - found_OGI), axis=-1)
            is_better_OG = error_OG < best[0]
            new = (error_OG, *stored)
            best = tuple(jnp.where(is_better_OG, *pair) for pair in zip(new, best))
            fit = _least_squares(w_OGI, integers_OGI)
        return best, None

    zero_OG = jnp.zeros(range_OG.shape, jnp.bfloat16)
    worst: Fit = (jnp.full(range_OG.shape, jnp.inf), zero_OG, zero_OG)
    (_, scale_OG, minimum_OG), _ = jax.lax.scan(attempt, worst, jnp.asarray(RANGE_FRACTIONS))
    integers_OI = _integers(w_OGI, scale_OG, minimum_OG).reshape(O, -1)
    return Quantized(pack(integers_OI), scale_OG, minimum_OG)


Fit = tuple[jax.Array, ...]  # squared error, scale and minimum, all [O, G]


def _nonzero(scale: jax.Array) -> jax.Array:
    """Return the scale with 1 for 0, to divide by: what has a scale of 0 is 0 itself."""
    return jnp.where(scale == 0, 1, scale)


def _integers(w_OGI: jax.Array, scale_OG: jax.Array, minimum_OG: jax.Array) -> jax.Array:
    """Return the nearest integers, as float32."""
    scale_OG, minimum_OG = scale_OG.astype(jnp.float32), minimum_OG.astype(jnp.float32)
    steps_OGI = (w_OGI - minimum_OG[:, :, None]) / _nonzero(scale_OG)[:, :, None]
    return jnp.clip(jnp.round(steps_OGI), 0, INT4_MAX)


def _least_squares(w_OGI: jax.Array, integers_OGI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the scale and minimum, [O, G], that fit the integers to the numbers best."""
    integers_OG1, w_OG1 = (x.mean(axis=-1, keepdims=True) for x in (integers_OGI, w_OGI))
    off_OGI = integers_OGI - integers_OG1
    covariance_OG = jnp.sum(off_OGI * (w_OGI - w_OG1), axis=-1)
    scale_OG = covariance_OG / _nonzero(jnp.sum(jnp.square(off_OGI), axis=-1))
    return scale_OG, w_OG1[:, :, 0] - scale_OG * integers_OG1[:, :, 0]
