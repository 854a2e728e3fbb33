"""What is done to logits before they become probabilities: a bias for tokens, a price on repeating.

Does not know temperature, filters or draws. Logits are float32 [B, V]; each row has its own counts.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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
