"""From logits to the next token: temperature, top-k, top-p, then one draw.

No sorting: a filter keeps the tokens at or above a threshold, and the threshold is found by
bisection on the bits of float32, exactly, in 30 passes. Tokens as likely as the last one kept are
kept too. Order: temperature, top-k, top-p over what top-k left.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.errors import UsageError

BITS_OF_ONE = 0x3F800000  # of float32 1.0; non-negative floats are ordered like their bits
DRAW_BLOCK = 256  # tokens whose weights are summed before the draw looks closer
COLDEST = float(jnp.finfo(jnp.float32).tiny)  # a lower temperature is 0 on the device
LARGEST_K = 2**31 - 1  # of int32; more than any vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to choose a token. Changing the numbers does not recompile; switching a filter does."""

    temperature: float
    top_k: int
    top_p: float
    greedy: bool = dataclasses.field(metadata={"static": True})
    filters_k: bool = dataclasses.field(metadata={"static": True})
    filters_p: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """One token a row, int32 [B]; a row depends on its own logits and key only."""
        if self.greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return draw(self.weights(logits_BV), keys_B)

    def weights(self, logits_BV: jax.Array) -> jax.Array:
        """What each token's probability is proportional to, in [0, 1]; 0 for those left out."""
        logits_BV = logits_BV.astype(jnp.float32)
        below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
        weights_BV = jnp.exp(below_BV / self.temperature)  # the largest is 0 / temperature
        if self.filters_k:
            weights_BV = keep_most(weights_BV, lambda kept_BV: kept_BV > 0, self.top_k)
        if self.filters_p:
            mass_B = self.top_p * weights_BV.sum(axis=-1)
            weights_BV = keep_most(weights_BV, lambda kept_BV: kept_BV, mass_B)
        return weights_BV


def make_sampler(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampler:
    """A sampler; temperature 0 is greedy, top_k 0 and top_p 1 are off.

    Raises:
      UsageError: naming the argument and its range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature={temperature} is out of range; expected 0 (greedy) or more")
    if top_k < 0:
        raise UsageError(f"top_k={top_k} is out of range; expected 0 (off) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} is out of range; expected more than 0, up to 1 (off)")
    return Sampler(
        temperature=temperature,
        top_k=min(top_k, LARGEST_K),
        top_p=top_p,
        greedy=temperature < COLDEST,
        filters_k=top_k > 0,
        filters_p=top_p < 1,
    )


def keep_most(
    weights_BV: jax.Array, measure: Callable[[jax.Array], jax.Array], target: jax.Array | float
) -> jax.Array:
    """`weights` with the lightest tokens set to 0, as many as leave the measure at the target.

    The kept are those at or above the highest threshold at which the sum over tokens of
    `measure(kept)` reaches `target`; the heaviest is always kept.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # reached at low, not reached above high
        middle_B = low_B + (high_B - low_B + 1) // 2
        kept_BV = jnp.where(weights_BV >= _as_float(middle_B)[:, None], weights_BV, 0.0)
        reached_B = jnp.sum(measure(kept_BV), axis=-1) >= target
        return jnp.where(reached_B, middle_B, low_B), jnp.where(reached_B, high_B, middle_B - 1)

    rows = weights_BV.shape[0]
    start = (jnp.zeros(rows, jnp.int32), jnp.full(rows, BITS_OF_ONE, jnp.int32))
    low_B, _ = jax.lax.fori_loop(0, 30, halve, start)
    return jnp.where(weights_BV >= _as_float(low_B)[:, None], weights_BV, 0.0)


def _as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def draw(weights_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token a row with probability proportional to its weight, from one uniform number a row.

    Inverts the cumulative sum in two steps, block and then token, which reads the weights once.
    """
    rows, V = weights_BV.shape
    padded = jnp.pad(weights_BV, ((0, 0), (0, -V % DRAW_BLOCK)))
    blocks = padded.reshape(rows, -1, DRAW_BLOCK)
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    block_B, rest_B = _invert(blocks.sum(axis=-1), uniform_B * blocks.sum(axis=(1, 2)))
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _invert(inside, rest_B)
    return (block_B * DRAW_BLOCK + token_B).astype(jnp.int32)


def _invert(weights: jax.Array, point_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The item of positive weight in which a point of the cumulative sum lies, and how deep."""
    ends = jnp.cumsum(weights, axis=-1)
    places = jnp.arange(weights.shape[-1])[None]
    last_positive_B = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    index_B = jnp.minimum(jnp.sum(ends <= point_B[:, None], axis=-1), last_positive_B)
    before_B = jnp.take_along_axis(ends - weights, index_B[:, None], axis=-1)[:, 0]
    return index_B, point_B - before_B
