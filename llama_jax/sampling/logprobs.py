"""Log-probabilities to report beside tokens, of what the model said and not of what was drawn from.

They come before temperature, bias, penalties and filters, as OpenAI's API and llama-cpp-python
report them, so they can be compared between settings and add up to a text's score.
"""

import dataclasses

import jax
import jax.numpy as jnp


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
