"""The exponential function with the same bits in every program.

XLA has more than one way to compile `exp` on CPU, and which it takes depends on the number of
rows; the last bit differs. Multiplications, additions and whole numbers leave it no such choice.
"""

import math

import jax
import jax.numpy as jnp

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
