"""From logits to the next token: adjust the logits, filter the tokens, draw one per sequence.

The order, each step on the result of the one before:

1. `logit_bias` is added to the logits of some tokens.
2. `repetition_penalty`: tokens of prompt and completion; positive logits are divided by it,
   negative ones multiplied (Keskar et al. 2019).
3. `presence_penalty`, `frequency_penalty` are subtracted from tokens of the completion.
4. Tokens that a constraint does not allow (see `inference.constraints`) get minus infinity.
5. `temperature` divides the logits; 0 takes the most likely token and ends here.
6. `top_k`, 7. `top_p` (Holtzman et al. 2020), 8. `min_p` filter the tokens.

Every parameter is an array with one entry per sequence, so different requests share one program. A
sequence gets the same token, to the bit, alone and in any batch, for two reasons: probabilities
become whole numbers before they are added up, so sums are exact in any order, and `exponential`
has the same bits in every program.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.inference.request import MAX_TOKEN_ID, SamplingParams

MAX_TEMPERATURE = 1e30  # a higher temperature is this: its reciprocal would be 0 in float32
MAX_ADJUSTMENT = 1e9  # biases and penalties are clipped to it, so that float32 does not overflow
MIN_BIASES = 8  # space for biases is this or the next power of two, so few sizes are compiled
MAX_BIASES = 512  # space for them where it may not grow, at `Level.ALL`


class Level(enum.IntEnum):
    """Steps that a sampler has, whether its parameters use them or not: few programs for all."""

    GREEDY = 0  # only the most likely token
    DRAW = 1  # and temperature with the filters
    ALL = 2  # and biases, penalties and what a constraint allows

    @classmethod
    def of(cls, params: SamplingParams) -> "Level":
        """Return the lowest level that has the steps of these parameters."""
        is_plain = not (params.has_penalties or params.logit_bias or params.constraint)
        if not is_plain or params.logprobs is not None:
            return cls.ALL
        return cls.GREEDY if params.is_greedy else cls.DRAW


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in each sequence, int32 [B, V], the prompt counted apart."""

    prompt_BV: jax.Array
    generated_BV: jax.Array

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], vocab_size: int) -> "TokenCounts":
        """Return the counts of prompts, with nothing generated yet."""
        counts_BV = np.stack([np.bincount(prompt, minlength=vocab_size) for prompt in prompts])
        return cls(jnp.asarray(counts_BV, jnp.int32), jnp.zeros(counts_BV.shape, jnp.int32))

    def add(self, token_B: jax.Array, active_B: jax.Array) -> "TokenCounts":
        """Return the counts after one more generated token in each active sequence."""
        rows_B = jnp.arange(token_B.shape[0])
        generated_BV = self.generated_BV.at[rows_B, token_B].add(active_B.astype(jnp.int32))
        return dataclasses.replace(self, generated_BV=generated_BV)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Sampling parameters of a batch, an entry per sequence.

    A step that no sequence uses has None in place of its arrays and costs nothing. Other values
    use the same compiled program; turning a step on or off compiles another.
    """

    temperature_B: jax.Array | None  # None: every sequence is greedy
    greedy_B: jax.Array | None  # None: no sequence is greedy
    top_k_B: jax.Array | None
    top_p_B: jax.Array | None
    min_p_B: jax.Array | None
    penalties_B: tuple[jax.Array, jax.Array, jax.Array] | None  # repetition, presence, frequency
    biases_BI: tuple[jax.Array, jax.Array] | None  # token ids (`MAX_TOKEN_ID`: none) and values
    allowed_BW: jax.Array | None = None  # a bit per token of the next one, from `constraints.masks`

    @classmethod
    def of(cls, params: Sequence[SamplingParams], level: Level | None = None) -> "Sampler":
        """Return the sampler of a batch of sequences with these parameters.

        Args:
          level: the steps it has, used or not; None: those that some sequence uses.
        """

        def has(is_used: bool, least: Level) -> bool:
            return is_used if level is None else level >= least

        greedy = [each.is_greedy for each in params]
        sampled = [each for each in params if not each.is_greedy]
        temperatures = [1.0 if each.is_greedy else each.temperature for each in params]
        draws = has(bool(sampled), Level.DRAW)
        penalties = None
        if has(any(each.has_penalties for each in params), Level.ALL):
            limit = MAX_ADJUSTMENT
            penalties = (
                _column((each.repetition_penalty for each in params), 1 / limit, limit),
                _column((each.presence_penalty for each in params), -limit, limit),
                _column((each.frequency_penalty for each in params), -limit, limit),
            )
        # 0 turns top_k off: then all tokens are among the first MAX_TOKEN_ID.
        top_k = [min(each.top_k or MAX_TOKEN_ID, MAX_TOKEN_ID) for each in params]
        filters_k = has(any(each.top_k for each in sampled), Level.DRAW)
        filters_p = has(any(each.top_p < 1 for each in sampled), Level.DRAW)
        filters_min_p = has(any(each.min_p for each in sampled), Level.DRAW)
        biases = has(any(each.logit_bias for each in params), Level.ALL)
        return cls(
            temperature_B=_column(temperatures, 0, MAX_TEMPERATURE) if draws else None,
            greedy_B=jnp.asarray(greedy) if draws and has(any(greedy), Level.DRAW) else None,
            top_k_B=jnp.asarray(top_k, jnp.int32) if filters_k else None,
            top_p_B=_column((each.top_p for each in params), 0, 1) if filters_p else None,
            min_p_B=_column((each.min_p for each in params), 0, 1) if filters_min_p else None,
            penalties_B=penalties,
            biases_BI=_bias_arrays(params, MAX_BIASES if level else MIN_BIASES) if biases else None,
        )

    @property
    def needs_counts(self) -> bool:
        """Whether some sequence has a penalty, for which `TokenCounts` are needed."""
        return self.penalties_B is not None

    def __call__(
        self, logits_BV: jax.Array, keys_B: jax.Array, counts: TokenCounts | None = None
    ) -> jax.Array:
        """Return a token per sequence, int32 [B]; `counts` only if `needs_counts`."""
        logits_BV = self.adjust(logits_BV, counts)
        if self.temperature_B is None:
            return most_likely(logits_BV)
        token_B = draw(self.masses(logits_BV), keys_B)
        if self.greedy_B is None:
            return token_B
        return jnp.where(self.greedy_B, most_likely(logits_BV), token_B)

    def adjust(self, logits_BV: jax.Array, counts: TokenCounts | None = None) -> jax.Array:
        """Return the logits with biases and penalties, and without tokens that are not allowed."""
        if self.biases_BI is not None:
            logits_BV = add_bias(logits_BV.astype(jnp.float32), *self.biases_BI)
        if self.penalties_B is not None:
            assert counts is not None, "penalties need token counts"
            repetition_B, presence_B, frequency_B = self.penalties_B
            logits_BV = logits_BV.astype(jnp.float32)
            logits_BV = penalize_repetition(logits_BV, counts, repetition_B)
            logits_BV = penalize_presence(logits_BV, counts, presence_B, frequency_B)
        if self.allowed_BW is not None:  # last, so that no bias allows a token again
            logits_BV = keep_allowed(logits_BV, self.allowed_BW)
        return logits_BV

    def masses(self, logits_BV: jax.Array) -> jax.Array:
        """Return the masses (see `masses`) of adjusted logits, 0 for filtered tokens."""
        assert self.temperature_B is not None
        logits_BV = logits_BV.astype(jnp.float32)
        below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
        # Explicit, since XLA turns this division into multiplication in some programs only.
        weights_BV = exponential(below_BV * (1 / self.temperature_B)[:, None])  # the largest is 1
        if self.top_k_B is not None:
            weights_BV = keep_top_k(weights_BV, self.top_k_B)
        masses_BV = masses(weights_BV)
        if self.top_p_B is not None:
            masses_BV = keep_top_p(masses_BV, self.top_p_B)
        if self.min_p_B is not None:
            masses_BV = keep_min_p(masses_BV, weights_BV, self.min_p_B)
        return masses_BV


def _column(values: Iterable[float], least: float, most: float) -> jax.Array:
    """Return a float32 entry per sequence, each clipped to a range."""
    return jnp.asarray([min(max(value, least), most) for value in values], jnp.float32)


def _bias_arrays(params: Sequence[SamplingParams], least: int) -> tuple[jax.Array, jax.Array]:
    """Return token ids and biases, [B, I] each; I is `least` or a greater power of two."""
    most = max(len(each.logit_bias) for each in params)
    shape = (len(params), max(2 ** (most - 1).bit_length(), least))
    ids_BI, bias_BI = np.full(shape, MAX_TOKEN_ID, np.int32), np.zeros(shape, np.float32)
    for row, each in enumerate(params):
        for place, (token, bias) in enumerate(each.logit_bias.items()):
            ids_BI[row, place] = token
            bias_BI[row, place] = min(max(bias, -MAX_ADJUSTMENT), MAX_ADJUSTMENT)
    return jnp.asarray(ids_BI), jnp.asarray(bias_BI)


def add_bias(logits_BV: jax.Array, ids_BI: jax.Array, bias_BI: jax.Array) -> jax.Array:
    """Return the logits plus a bias for some tokens; ids beyond the vocabulary are ignored."""
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, ids_BI].add(bias_BI, mode="drop")


def penalize_repetition(
    logits_BV: jax.Array, counts: TokenCounts, penalty_B: jax.Array
) -> jax.Array:
    """Return the logits with each token of prompt and completion made less likely.

    How often the token occurs makes no difference; 1 is neutral.
    """
    penalty_B1, is_positive_BV = penalty_B[:, None], logits_BV > 0
    # As one number per row, XLA would divide in some programs and multiply by the reciprocal in
    # others.
    divisor_BV = jnp.where(is_positive_BV, penalty_B1, 1.0)
    lower_BV = jnp.where(is_positive_BV, logits_BV / divisor_BV, logits_BV * penalty_B1)
    seen_BV = counts.prompt_BV + counts.generated_BV > 0
    return jnp.where(seen_BV, lower_BV, logits_BV)


def penalize_presence(
    logits_BV: jax.Array, counts: TokenCounts, presence_B: jax.Array, frequency_B: jax.Array
) -> jax.Array:
    """Return the logits less `presence` for a generated token and `frequency` for each occurrence.

    As in OpenAI's API the prompt does not count; 0 is neutral.
    """
    generated_BV = counts.generated_BV.astype(jnp.float32)
    lower_BV = logits_BV - presence_B[:, None] * (generated_BV > 0)
    return lower_BV - frequency_B[:, None] * generated_BV


def keep_allowed(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Return the logits, minus infinity for tokens whose bit is 0.

    Args:
      allowed_BW: uint32; token v is bit v % 32 of word v // 32. Some token of each row is allowed.
    """
    bit = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits_BV = (allowed_BW[:, :, None] >> bit & 1).reshape(allowed_BW.shape[0], -1)
    return jnp.where(bits_BV[:, : logits_BV.shape[1]] == 1, logits_BV, -jnp.inf)


# --- filters ---
#
# A filter keeps the tokens at or above a threshold, found by bisection: sorting the vocabulary is
# slower. Tokens as likely as the last one kept are kept too. The others get weight or mass 0.

BITS_OF_ONE = 0x3F800000  # of float32 1.0; non-negative floats are ordered like their bits


def keep_top_k(weights_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Return the weights of the k heaviest tokens of each sequence, k at least 1."""
    k_B1 = k_B[:, None]

    def reaches(threshold_B1: jax.Array) -> jax.Array:
        kept_BV = weights_BV >= _as_float(threshold_B1)
        # Float32 counts exactly to 2^24, and faster than int32 on CPU.
        return jnp.where(kept_BV, 1.0, 0.0).sum(axis=-1, keepdims=True) >= k_B1

    threshold_B1 = _as_float(_highest(reaches, BITS_OF_ONE, weights_BV.shape[0]))
    return jnp.where(weights_BV >= threshold_B1, weights_BV, 0.0)


def keep_top_p(masses_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Return the masses of the heaviest tokens, as few as have the fraction p of the sum.

    The token that brings the sum to p or beyond is the last one kept.
    """

    def kept(threshold_B1: jax.Array) -> jax.Array:
        return jnp.where(masses_BV >= threshold_B1.astype(jnp.float32), masses_BV, 0.0)

    def reaches(threshold_B1: jax.Array) -> jax.Array:
        return kept(threshold_B1).sum(axis=-1, keepdims=True) >= target_B1

    # The heaviest token is kept even where p is so small that it is 0 in float32.
    target_B1 = jnp.maximum(jnp.ceil(p_B[:, None] * masses_BV.sum(axis=-1, keepdims=True)), 1)
    return kept(_highest(reaches, TOTAL, masses_BV.shape[0]))


def keep_min_p(masses_BV: jax.Array, weights_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Return the masses of tokens at least p times as likely as the first, whose weight is 1."""
    return jnp.where(weights_BV >= p_B[:, None], masses_BV, 0.0)


def _highest(reaches: Callable[[jax.Array], jax.Array], largest: int, rows: int) -> jax.Array:
    """Return the highest integer up to `largest` at which a row reaches its target, [B, 1].

    `reaches` must be monotone: true up to some integer, false above it; it is taken to hold at 0.
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


# --- draws ---

TOTAL = 2**23  # a row's masses sum to about this at most; float32 is exact up to twice that
COARSE_TOTAL = 2**30  # the int32 sum that normalises them
DRAW_BLOCK = 256  # tokens per block of the two-step draw


def masses(weights_BV: jax.Array) -> jax.Array:
    """Return whole numbers, float32, proportional to weights but for rounding.

    Rounding changes a token's probability by at most 2^-24 · (1 + V²/2^30): 2^-23 where V is
    32,000, no more than the distance between two uniform random numbers.

    Args:
      weights_BV: float32 in [0, 1], the largest of each row 1.
    """
    steps = COARSE_TOTAL // weights_BV.shape[-1]  # per unit of weight
    coarse_B1 = jnp.ceil(weights_BV * steps).astype(jnp.int32).sum(axis=-1, keepdims=True)
    return jnp.round(weights_BV * (TOTAL * (steps / coarse_B1.astype(jnp.float32))))


def draw(masses_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Return a token per row with probability proportional to its mass, int32 [B].

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
    return jnp.minimum(block_B * DRAW_BLOCK + token_B, V - 1)  # NaN gives a token too


def invert(masses: jax.Array, point_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the item in which a point of the cumulative sum lies, and the distance from its start.

    The item's mass is positive.
    """
    ends = jnp.cumsum(masses, axis=-1)
    index_B = jnp.sum(ends <= point_B[:, None], axis=-1, dtype=jnp.int32)
    before_B = jnp.take_along_axis(ends - masses, index_B[:, None], axis=-1)[:, 0]
    return index_B, point_B - before_B


def most_likely(logits: jax.Array) -> jax.Array:
    """Return the token of the highest logit, int32 [...], of logits [..., V]; of ties the first."""
    V = logits.shape[-1]
    # `jnp.argmax` is five times slower on CPU: XLA does not vectorise it, but it does two maxima.
    places = jax.lax.broadcasted_iota(jnp.float32, logits.shape, logits.ndim - 1)  # exact to 2^24
    is_highest = logits == logits.max(axis=-1, keepdims=True)
    first = -jnp.where(is_highest, -places, -V).max(axis=-1)
    return jnp.minimum(first, V - 1).astype(jnp.int32)  # NaN gives a token too


UNIT_BITS = 23  # binary logarithms are counted in units of 2^-23
SMALLEST = -100  # a binary logarithm this low counts as that of 0
DEGREE = 7  # of the Taylor polynomial; the remainder is below 2^-27


def exponential(x: jax.Array) -> jax.Array:
    """Return e^x in float32 for x up to 0, with the same bits in every program.

    XLA has several ways to compile `exp` on CPU and chooses by the number of rows; their last bits
    differ. Multiplications, additions and integer operations leave it no such choice.
    """
    units = x * (2**UNIT_BITS / math.log(2))
    units = jnp.round(jnp.maximum(units, SMALLEST * 2.0**UNIT_BITS)).astype(jnp.int32)
    integer = (units + 2 ** (UNIT_BITS - 1)) >> UNIT_BITS
    fraction = (units - (integer << UNIT_BITS)).astype(jnp.float32) * 2.0**-UNIT_BITS  # -½ to ½
    power = jnp.full_like(fraction, _coefficient(DEGREE))
    for k in reversed(range(DEGREE)):
        power = power * fraction + _coefficient(k)
    two_to_integer = jax.lax.bitcast_convert_type((integer + 127) << 23, jnp.float32)
    return jnp.where(integer > SMALLEST, power * two_to_integer, 0.0)


def _coefficient(k: int) -> float:
    """Return the coefficient of the k-th power in the Taylor series of 2^x."""
    return math.log(2) ** k / math.factorial(k)
