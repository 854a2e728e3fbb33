"""One token a row: drawn in proportion to weights, or the likeliest.

Weights become whole numbers before they are added up. Such sums are exact, so in whatever order a
device adds, for one row or many, on one device or eight, a row and its key give the same token.
Does not know temperature, filters or seeds.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

TOTAL = 2**23  # what a row's masses sum to at most; float32 is exact up to twice that
COARSE_TOTAL = 2**30  # the same for int32
DRAW_BLOCK = 256  # tokens whose masses are summed before the draw looks closer


def masses(weights_BV: jax.Array) -> jax.Array:
    """Whole numbers, float32, proportional to weights but for rounding.

    Rounding moves a token's share of its row by at most 2^-24 · (1 + V²/2^30): 2^-23 where V is
    32,000, no more than the distance between two uniform numbers.

    Args:
      weights_BV: float32 in [0, 1], the largest of each row 1.
    """
    steps = COARSE_TOTAL // weights_BV.shape[-1]  # in 1
    coarse_B1 = jnp.ceil(weights_BV * steps).astype(jnp.int32).sum(axis=-1, keepdims=True)
    return jnp.round(weights_BV * (TOTAL * (steps / coarse_B1.astype(jnp.float32))))


def draw(masses_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token a row with probability proportional to its mass, int32 [B]; one random key a row.

    Inverts the cumulative sum at one uniform number in two steps, block and then token, which
    reads the masses once.
    """
    rows, V = masses_BV.shape
    padded = jnp.pad(masses_BV, ((0, 0), (0, -V % DRAW_BLOCK)))
    blocks = padded.reshape(rows, -1, DRAW_BLOCK)
    sums = blocks.sum(axis=-1)
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    block_B, rest_B = invert(sums, uniform_B * sums.sum(axis=-1))
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = invert(inside, rest_B)
    return jnp.minimum(block_B * DRAW_BLOCK + token_B, V - 1)  # a row of NaN gives a token too


def invert(masses: jax.Array, point_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The item in which a point of the cumulative sum lies, and how deep; its mass is positive."""
    ends = jnp.cumsum(masses, axis=-1)
    index_B = jnp.sum(ends <= point_B[:, None], axis=-1, dtype=jnp.int32)
    before_B = jnp.take_along_axis(ends - masses, index_B[:, None], axis=-1)[:, 0]
    return index_B, point_B - before_B


def likeliest(logits: jax.Array) -> jax.Array:
    """The token of the highest logit, int32 [...], of logits [..., V]; of equals the first."""
    V = logits.shape[-1]
    # `jnp.argmax` is five times slower on CPU: XLA does not vectorise it, but it does two maxima.
    places = jax.lax.broadcasted_iota(jnp.float32, logits.shape, logits.ndim - 1)  # exact to 2^24
    is_highest = logits == logits.max(axis=-1, keepdims=True)
    first = -jnp.where(is_highest, -places, -V).max(axis=-1)
    return jnp.minimum(first, V - 1).astype(jnp.int32)  # NaN gives a token too


# The exponential function with the same bits in every program.
#
# XLA has more than one way to compile `exp` on CPU, and which it takes depends on the number of
# rows; the last bit differs. Multiplications, additions and whole numbers leave it no such choice.

UNIT_BITS = 23  # binary logarithms are counted in units of 2^-23
SMALLEST = -100  # a binary logarithm this low counts as that of 0
DEGREE = 7  # of the Taylor polynomial; what is left out is below 2^-27


def exponential(x: jax.Array) -> jax.Array:
    """e^x in float32, for x up to 0; minus infinity gives 0."""
    units = x * (2**UNIT_BITS / math.log(2))
    units = jnp.round(jnp.maximum(units, SMALLEST * 2.0**UNIT_BITS)).astype(jnp.int32)
    whole = (units + 2 ** (UNIT_BITS - 1)) >> UNIT_BITS
    rest = (units - (whole << UNIT_BITS)).astype(jnp.float32) * 2.0**-UNIT_BITS  # within a half
    power = jnp.full_like(rest, _coefficient(DEGREE))
    for k in reversed(range(DEGREE)):
        power = power * rest + _coefficient(k)
    two_to_whole = jax.lax.bitcast_convert_type((whole + 127) << 23, jnp.float32)
    return jnp.where(whole > SMALLEST, power * two_to_whole, 0.0)


def _coefficient(k: int) -> float:
    """Of the k-th power in the series of 2^x."""
    return math.log(2) ** k / math.factorial(k)


# Which of a row's tokens may be drawn: the k likeliest, a nucleus, those not far behind the first.
#
# No sorting: a filter keeps the tokens at or above a threshold, found by bisection. Tokens as
# likely
# as the last one kept are kept too. Those left out have 0 in place of their weight or mass, which
# are what `drawing.masses` takes and gives.

BITS_OF_ONE = 0x3F800000  # of float32 1.0; non-negative floats are ordered like their bits


def keep_top_k(weights_BV: jax.Array, k: jax.Array | int) -> jax.Array:
    """The weights of the k heaviest tokens of each row, k at least 1."""

    def reaches(threshold_B1: jax.Array) -> jax.Array:
        kept_BV = weights_BV >= _as_float(threshold_B1)
        # Float32 counts exactly to 2^24, and faster than int32 on CPU.
        return jnp.where(kept_BV, 1.0, 0.0).sum(axis=-1, keepdims=True) >= k

    threshold_B1 = _as_float(_highest(reaches, BITS_OF_ONE, weights_BV.shape[0]))
    return jnp.where(weights_BV >= threshold_B1, weights_BV, 0.0)


def keep_top_p(masses_BV: jax.Array, p: jax.Array | float) -> jax.Array:
    """The masses of the heaviest tokens of each row, as few as have the fraction p of its sum.

    The token that brings the sum to p or beyond is the last one kept (Holtzman et al. 2020).
    """

    def kept(threshold_B1: jax.Array) -> jax.Array:
        return jnp.where(masses_BV >= threshold_B1.astype(jnp.float32), masses_BV, 0.0)

    def reaches(threshold_B1: jax.Array) -> jax.Array:
        return kept(threshold_B1).sum(axis=-1, keepdims=True) >= target_B1

    # A p so small that it is 0 on the device keeps the heaviest all the same.
    target_B1 = jnp.maximum(jnp.ceil(p * masses_BV.sum(axis=-1, keepdims=True)), 1)
    return kept(_highest(reaches, TOTAL, masses_BV.shape[0]))


def keep_min_p(masses_BV: jax.Array, weights_BV: jax.Array, p: jax.Array | float) -> jax.Array:
    """The masses of the tokens at least p times as likely as the likeliest, whose weight is 1."""
    return jnp.where(weights_BV >= p, masses_BV, 0.0)


def _highest(reaches: Callable[[jax.Array], jax.Array], largest: int, rows: int) -> jax.Array:
    """The highest whole number up to `largest` at which a row reaches its target, [B, 1].

    A row that reaches it at a number reaches it at those below; 0 is taken to reach it.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds  # reached at low, not reached above high
        middle_B1 = low_B1 + (high_B1 - low_B1 + 1) // 2
        is_reached = reaches(middle_B1)
        low_B1 = jnp.where(is_reached, middle_B1, low_B1)
        return low_B1, jnp.where(is_reached, high_B1, middle_B1 - 1)

    bounds = (jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), largest, jnp.int32))
    return jax.lax.fori_loop(0, largest.bit_length(), halve, bounds)[0]


def _as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
