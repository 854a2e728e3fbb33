"""Checksums of arrays: does what is read have the bits that were written?

A checksum is the sum of an array's bits modulo 2³², each element's times 2·place + 1, so that two
that swap places are noticed. It depends on values alone: not on sharding, and not on the portions
in which an array is read. Does not know where arrays come from.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PORTION = 2**18  # elements summed at once on the host; what is held beside the array is small


def checksums(leaves: dict[str, Any]) -> dict[str, int]:
    """The checksums of a mapping of arrays, computed where each of them lies."""
    return {name: int(value) for name, value in jax.device_get(_checksums(leaves)).items()}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def checksum(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.bool:
            array = array.astype(jnp.uint8)
        width = jnp.dtype(array.dtype).itemsize * 8
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, leaves)


def partial_checksum(part: np.ndarray, start: int = 0) -> int:
    """What a part of an array on the host adds to its checksum.

    The checksum is the sum of those of all parts, modulo 2³².

    Args:
      part: elements that follow each other in the array, in C order and of at most 4 bytes each.
      start: the place of the first of them.
    """
    bits = np.ascontiguousarray(part).reshape(-1).view(f"uint{part.dtype.itemsize * 8}")
    weights = np.arange(1, 2 * min(PORTION, bits.size), 2, dtype=np.uint32)
    total = 0
    for begin in range(0, bits.size, PORTION):
        portion = bits[begin : begin + PORTION].astype(np.uint32, copy=False)
        moved = 2 * (start + begin) * int(portion.sum(dtype=np.uint32))
        total += moved + int(np.dot(portion, weights[: portion.size]))
    return total % 2**32
