"""Log-probabilities to report beside tokens, of what the model said and not of what was drawn from.

They come before temperature, bias, penalties and filters, as OpenAI's API and llama-cpp-python
report them, so they can be compared between settings and add up to a text's score.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import UsageError, finite_number, whole_number
from llama_jax.inference.filters import (
    draw,
    exponential,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    masses,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms, float32: of the tokens asked for, and of the n likeliest, falling."""

    token: jax.Array  # [...]
    top_ids: jax.Array  # [..., n] int32; of equally likely tokens the lower id comes first
    top: jax.Array  # [..., n]


def top_logprobs(logits: jax.Array, tokens: jax.Array, n: int) -> TokenLogprobs:
    """The log-probabilities of tokens [...] and of the n likeliest under logits [..., V].

    Args:
      n: up to V, 0 for those of the tokens alone; must be static under `jit`.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    token = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(logprobs, n)
    return TokenLogprobs(token, top_ids, top)


# What is done to logits before they become probabilities: a bias for tokens, a price on repeating.
#
# Does not know temperature, filters or draws. Logits are float32 [B, V]; each row has its own
# counts.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often each token stands in each row, int32 [B, V], its prompt apart."""

    prompt_BV: jax.Array
    generated_BV: jax.Array

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], vocab_size: int) -> "TokenCounts":
        """The counts of prompts, with nothing generated yet."""
        counts_BV = np.stack([np.bincount(prompt, minlength=vocab_size) for prompt in prompts])
        return cls(jnp.asarray(counts_BV, jnp.int32), jnp.zeros(counts_BV.shape, jnp.int32))

    def add(self, token_B: jax.Array, active_B: jax.Array) -> "TokenCounts":
        """These counts with one generated token more in each active row."""
        rows_B = jnp.arange(token_B.shape[0])
        generated_BV = self.generated_BV.at[rows_B, token_B].add(active_B.astype(jnp.int32))
        return dataclasses.replace(self, generated_BV=generated_BV)


def add_bias(
    logits_BV: jax.Array, ids_I: jax.Array | np.ndarray, bias_I: jax.Array | np.ndarray
) -> jax.Array:
    """The logits with a bias for some tokens; ids beyond the vocabulary are passed over."""
    return logits_BV.at[:, ids_I].add(bias_I[None], mode="drop")


def penalize_repetition(
    logits_BV: jax.Array, counts: TokenCounts, penalty: jax.Array | float
) -> jax.Array:
    """The logits with each token of prompt and continuation made less likely (Keskar et al. 2019).

    A positive logit is divided by the penalty and a negative one multiplied, however often the
    token occurred; 1 changes nothing, less than 1 favours repetition.
    """
    seen_BV = counts.prompt_BV + counts.generated_BV > 0
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def penalize_presence(
    logits_BV: jax.Array,
    counts: TokenCounts,
    presence: jax.Array | float,
    frequency: jax.Array | float,
) -> jax.Array:
    """The logits less `presence` for a token generated already, less `frequency` for each time.

    As OpenAI's API has it: the prompt does not count, and 0 changes nothing.
    """
    generated_BV = counts.generated_BV.astype(jnp.float32)
    return logits_BV - presence * (generated_BV > 0) - frequency * generated_BV


# From logits to the next token: a chain of pure functions, then one draw a row.
#
# The order, each step over what the one before left; a step that is off costs nothing:
#
# 1. `logit_bias`: added to the logits of some tokens.
# 2. `repetition_penalty`: tokens of prompt and continuation; positive logits / it, others × it.
# 3. `presence_penalty`, `frequency_penalty`: subtracted from tokens of the continuation.
# 4. `temperature`: the logits are divided by it; 0 takes the likeliest token and ends here.
# 5. `top_k`: the k likeliest stay.
# 6. `top_p`: the likeliest stay, as few as together have this probability.
# 7. `min_p`: those at least this many times as likely as the likeliest stay.
#
# Does not know models, text or seeds. To the bit, a row depends on its own logits, counts and key.

COLDEST = float(jnp.finfo(jnp.float32).tiny)  # a lower temperature is 0 on the device
HOTTEST = 1e30  # a higher temperature is this: its reciprocal would be 0 on the device
LARGEST = 1e9  # a bias or penalty beyond it counts as it: float32 does not overflow
LARGEST_ID = 2**31 - 1  # of int32; more than any vocabulary has
FEWEST_BIASES = 8  # room for biases is this or the next power of two, so few sizes are compiled
NO_BIAS: Mapping[int, float] = MappingProxyType({})
ANY_NUMBER = (lambda _: True, "a finite number; 0 is off")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """How to choose a token. Changing the numbers does not recompile; switching a step does."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_ids_I: np.ndarray  # int32; `LARGEST_ID` where there is room
    bias_I: np.ndarray  # float32
    greedy: bool = dataclasses.field(metadata={"static": True})
    filters_k: bool = dataclasses.field(metadata={"static": True})
    filters_p: bool = dataclasses.field(metadata={"static": True})
    filters_min_p: bool = dataclasses.field(metadata={"static": True})
    needs_counts: bool = dataclasses.field(metadata={"static": True})  # some penalty is on

    def __call__(
        self, logits_BV: jax.Array, keys_B: jax.Array, counts: TokenCounts | None = None
    ) -> jax.Array:
        """One token a row, int32 [B]; `counts` only if `needs_counts`."""
        if self.greedy:
            return likeliest(self.penalized(logits_BV, counts))
        return draw(self.masses(logits_BV, counts), keys_B)

    def masses(self, logits_BV: jax.Array, counts: TokenCounts | None = None) -> jax.Array:
        """What tokens' probabilities are proportional to (see `drawing`); 0 for those left out."""
        logits_BV = self.penalized(logits_BV, counts).astype(jnp.float32)
        below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
        weights_BV = exponential(below_BV / self.temperature)  # the largest is 0 / temperature
        if self.filters_k:
            weights_BV = keep_top_k(weights_BV, self.top_k)
        masses_BV = masses(weights_BV)
        if self.filters_p:
            masses_BV = keep_top_p(masses_BV, self.top_p)
        if self.filters_min_p:
            masses_BV = keep_min_p(masses_BV, weights_BV, self.min_p)
        return masses_BV

    def penalized(self, logits_BV: jax.Array, counts: TokenCounts | None = None) -> jax.Array:
        """The logits with bias and penalties."""
        if self.bias_ids_I.size:
            logits_BV = add_bias(logits_BV.astype(jnp.float32), self.bias_ids_I, self.bias_I)
        if self.needs_counts:
            assert counts is not None, "this sampler's penalties need token counts"
            logits_BV = logits_BV.astype(jnp.float32)
            logits_BV = penalize_repetition(logits_BV, counts, self.repetition_penalty)
            logits_BV = penalize_presence(
                logits_BV, counts, self.presence_penalty, self.frequency_penalty
            )
        return logits_BV

    def require_ids_below(self, vocab_size: int) -> None:
        """Raise `UsageError` if there is a bias for a token that the vocabulary does not have."""
        for token in self.bias_ids_I.tolist():
            if vocab_size <= token < LARGEST_ID:
                raise UsageError(
                    f"logit_bias has the token id {token}; expected 0 to {vocab_size - 1}"
                )


def make_sampler(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] = NO_BIAS,
) -> Sampler:
    """A sampler; temperature 0 is greedy, and the other defaults are off.

    Args:
      temperature: 0 or more.
      top_k: tokens, 0 (off) or more.
      top_p: a probability, more than 0, up to 1 (off).
      min_p: a fraction, 0 (off) to 1 (those as likely as the likeliest).
      repetition_penalty: more than 0; 1 is off, more than 1 discourages.
      presence_penalty: of logits; 0 is off, more than 0 discourages.
      frequency_penalty: of logits, for each time; 0 is off, more than 0 discourages.
      logit_bias: of logits, by token id; minus infinity forbids a token.

    Raises:
      UsageError: naming the argument and its range.
    """
    temperature = finite_number("temperature", temperature, lambda t: t >= 0, "0 (greedy) or more")
    top_k = whole_number("top_k", top_k, lambda k: k >= 0, "0 (off) or more")
    top_p = finite_number("top_p", top_p, lambda p: 0 < p <= 1, "more than 0, up to 1 (off)")
    min_p = finite_number("min_p", min_p, lambda p: 0 <= p <= 1, "0 (off) to 1")
    repetition = finite_number(
        "repetition_penalty", repetition_penalty, lambda r: r > 0, "more than 0; 1 is off"
    )
    presence = finite_number("presence_penalty", presence_penalty, *ANY_NUMBER)
    frequency = finite_number("frequency_penalty", frequency_penalty, *ANY_NUMBER)
    bias_ids_I, bias_I = _bias_arrays(logit_bias)
    return Sampler(
        temperature=min(max(temperature, COLDEST), HOTTEST),
        top_k=min(top_k, LARGEST_ID),
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=min(max(repetition, 1 / LARGEST), LARGEST),
        presence_penalty=min(max(presence, -LARGEST), LARGEST),
        frequency_penalty=min(max(frequency, -LARGEST), LARGEST),
        bias_ids_I=bias_ids_I,
        bias_I=bias_I,
        greedy=temperature < COLDEST,
        filters_k=top_k > 0,
        filters_p=top_p < 1,
        filters_min_p=min_p > 0,
        needs_counts=(repetition, presence, frequency) != (1, 0, 0),
    )


def _bias_arrays(logit_bias: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and biases, with room up to a size that others share."""
    if not isinstance(logit_bias, Mapping):
        raise UsageError(f"logit_bias={logit_bias!r} is not a mapping; expected {{id: bias}}")
    room = 2 ** (len(logit_bias) - 1).bit_length() if logit_bias else 0
    room = max(room, FEWEST_BIASES) if logit_bias else 0
    ids_I, bias_I = np.full(room, LARGEST_ID, np.int32), np.zeros(room, np.float32)
    for place, (token, bias) in enumerate(logit_bias.items()):
        expected = f"token ids of 0 to {LARGEST_ID - 1}"
        ids_I[place] = whole_number("logit_bias", token, lambda i: 0 <= i < LARGEST_ID, expected)
        if not (isinstance(bias, numbers.Real) and bias == -np.inf):
            expected = "a finite number or minus infinity"
            bias = finite_number(f"logit_bias[{token}]", bias, lambda _: True, expected)
        bias_I[place] = min(max(bias, -LARGEST), LARGEST)
    return ids_I, bias_I
