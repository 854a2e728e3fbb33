"""Rounding at random, so that small changes to numbers kept in few bits are not lost.

A float32 becomes the bfloat16 below or above it, each with the probability that makes the result
right on average (Croci et al. 2022, "Stochastic rounding", section 2). Where rounding to nearest
drops a change of less than half a unit for ever, this lets it through now and then. Does not know
what is rounded.
"""

import jax
import jax.numpy as jnp

DROPPED = 16  # bits that bfloat16 has fewer than float32, all of them at the end


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Finite float32 as bfloat16; equal to `x` on average over keys, exact where it can be."""
    noise = _hashed(_hashed(_places(x.shape)) ^ jax.random.bits(key)) >> DROPPED
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> DROPPED).astype(jnp.uint16), jnp.bfloat16)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """The number of each element, counted through the array, modulo 2³²."""
    place = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return place


def _hashed(x: jax.Array) -> jax.Array:
    """32 bits, all of which depend on all of those given: MurmurHash3's last steps (Appleby).

    Not `jax.random.bits` for every element: on CPU those do not fuse with what they are added to,
    and each array of noise would be held whole.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
