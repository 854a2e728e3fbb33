"""One token a row: drawn in proportion to weights, or the likeliest.

Weights become whole numbers before they are added up. Such sums are exact, so in whatever order a
device adds, for one row or many, on one device or eight, a row and its key give the same token.
Does not know temperature, filters or seeds.
"""

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
