"""Which integers stand for a matrix [O, I] of floats, and what they are to be multiplied by.

Only the numbers themselves are looked at: no data, no neighbours in a model.
"""

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.kernels.int4 import BLOCK, Quantized, packed

HIGHEST = 15  # of four bits
STARTS = (1.0, 0.95, 0.9, 0.85, 0.8)  # parts of a group's range tried as the range of its integers
REFITS = 2  # of each
AT_ONCE = 2**18  # numbers rounded together: what stays in a core's cache is rounded 4 times as fast


@jax.jit
def to_int8(kernel_OI: jax.Array) -> Quantized:
    """-127 to 127, with a float32 scale for each output: the largest number keeps its size."""
    wide_OI = kernel_OI.astype(jnp.float32)
    scale_O = jnp.max(jnp.abs(wide_OI), axis=1) / 127
    whole_OI = jnp.round(wide_OI / _nonzero(scale_O)[:, None])
    return Quantized(whole_OI.astype(jnp.int8), scale_O)


@partial(jax.jit, static_argnames="group_size")
def to_int4(kernel_OI: jax.Array, group_size: int) -> Quantized:
    """0 to 15, with a bfloat16 scale and lowest number for each group of adjacent inputs.

    Of some lines from integers to numbers the one with the least squared error is kept: each
    begins with a part of the group's range and is fitted again to the integers it led to.
    """

    def rounded(row_I: jax.Array) -> Quantized:
        made = _to_int4(row_I[None], group_size)
        return jax.tree.map(lambda array: array[0], made)

    O, I = kernel_OI.shape
    return jax.lax.map(rounded, kernel_OI, batch_size=min(O, max(1, AT_ONCE // I)))


def _to_int4(kernel_OI: jax.Array, group_size: int) -> Quantized:
    O, I = kernel_OI.shape
    wide_OI = kernel_OI.astype(jnp.float32)
    wide_OI = jnp.pad(wide_OI, ((0, 0), (0, -I % BLOCK)), mode="edge")  # stretches no range
    w_OGI = wide_OI.reshape(O, -1, group_size)
    highest_OG, lowest_OG = w_OGI.max(axis=-1), w_OGI.min(axis=-1)
    middle_OG, range_OG = (highest_OG + lowest_OG) / 2, highest_OG - lowest_OG

    def attempt(best: Fit, start: jax.Array) -> tuple[Fit, None]:
        scale_OG = range_OG * (start / HIGHEST)
        line = (scale_OG, middle_OG - scale_OG * (HIGHEST / 2))
        for _ in range(REFITS + 1):
            held = line[0].astype(jnp.bfloat16), line[1].astype(jnp.bfloat16)
            whole_OGI = _integers(w_OGI, *held)
            best = _better(best, (_squared_error(w_OGI, whole_OGI, *held), *held))
            line = _fitted(w_OGI, whole_OGI)
        return best, None

    nothing_OG = jnp.zeros(range_OG.shape, jnp.bfloat16)
    worst = (jnp.full(range_OG.shape, jnp.inf), nothing_OG, nothing_OG)
    (_, scale_OG, lowest_OG), _ = jax.lax.scan(attempt, worst, jnp.asarray(STARTS))
    whole_OI = _integers(w_OGI, scale_OG, lowest_OG).reshape(O, -1)
    return Quantized(packed(whole_OI), scale_OG, lowest_OG)


Fit = tuple[jax.Array, jax.Array, jax.Array]  # squared error, scale and lowest number, all [O, G]


def _nonzero(scale: jax.Array) -> jax.Array:
    """A scale to divide by: whatever is divided by a scale of 0 is 0 itself."""
    return jnp.where(scale == 0, 1, scale)


def _integers(w_OGI: jax.Array, scale_OG: jax.Array, lowest_OG: jax.Array) -> jax.Array:
    """The nearest integers on a line, still as floats."""
    scale_OG, lowest_OG = scale_OG.astype(jnp.float32), lowest_OG.astype(jnp.float32)
    steps_OGI = (w_OGI - lowest_OG[:, :, None]) / _nonzero(scale_OG)[:, :, None]
    return jnp.clip(jnp.round(steps_OGI), 0, HIGHEST)


def _squared_error(
    w_OGI: jax.Array, whole_OGI: jax.Array, scale_OG: jax.Array, lowest_OG: jax.Array
) -> jax.Array:
    scale_OG, lowest_OG = scale_OG.astype(jnp.float32), lowest_OG.astype(jnp.float32)
    found_OGI = whole_OGI * scale_OG[:, :, None] + lowest_OG[:, :, None]
    return jnp.sum(jnp.square(w_OGI - found_OGI), axis=-1)


def _better(one: Fit, other: Fit) -> Fit:
    """Of two fits the one with the smaller error, group by group."""
    is_better = other[0] < one[0]
    error, scale, lowest = (jnp.where(is_better, new, old) for new, old in zip(other, one))
    return error, scale, lowest


def _fitted(w_OGI: jax.Array, whole_OGI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale and lowest number of the line through integers and numbers, by least squares."""
    whole_OG1, w_OG1 = (x.mean(axis=-1, keepdims=True) for x in (whole_OGI, w_OGI))
    off_OGI = whole_OGI - whole_OG1
    together_OG = jnp.sum(off_OGI * (w_OGI - w_OG1), axis=-1)
    scale_OG = together_OG / _nonzero(jnp.sum(jnp.square(off_OGI), axis=-1))
    return scale_OG, w_OG1[:, :, 0] - scale_OG * whole_OG1[:, :, 0]
