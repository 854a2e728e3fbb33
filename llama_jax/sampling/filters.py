"""Which of a row's tokens may be drawn: the k likeliest, a nucleus, those not far behind the first.

No sorting: a filter keeps the tokens at or above a threshold, found by bisection. Tokens as likely
as the last one kept are kept too. Those left out have 0 in place of their weight or mass, which
are what `drawing.masses` takes and gives.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.sampling.drawing import TOTAL

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
