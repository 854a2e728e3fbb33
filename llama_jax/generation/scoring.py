"""What a model thinks of given tokens: log-probabilities, and embeddings of whole sequences."""

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.model import Llama

POSITIONS = 64  # of each row, whose logits exist at once


@jax.jit
def token_logprobs(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Nats [B, T - 1] of each token after the first, given those before it; float32.

    Padding may follow a row: later tokens change nothing before them.
    """
    hidden_BTD, _ = model.hidden(tokens_BT)
    B, T = tokens_BT.shape
    pieces = -(-(T - 1) // POSITIONS)
    fill = ((0, 0), (0, pieces * POSITIONS - (T - 1)))

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, fill + ((0, 0),) * (x.ndim - 2))
        return filled.reshape(B, pieces, POSITIONS, *x.shape[2:]).swapaxes(0, 1)

    def piece(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCD, targets_BC = pair
        logits_BCV = model.logits(hidden_BCD)
        chosen_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)
        return chosen_BC1[:, :, 0] - jax.nn.logsumexp(logits_BCV, axis=-1)

    told = jax.lax.map(piece, (cut(hidden_BTD[:, :-1]), cut(tokens_BT[:, 1:])))
    return told.swapaxes(0, 1).reshape(B, -1)[:, : T - 1]


@partial(jax.jit, static_argnames="normalize")
def embeddings(
    model: Llama, tokens_BT: jax.Array, length_B: jax.Array, normalize: bool = True
) -> jax.Array:
    """The mean over each row's tokens of the last hidden states, float32 [B, D].

    `normalize` scales each to length 1, so that a dot product of two is their cosine.
    """
    hidden_BTD, _ = model.hidden(tokens_BT)
    is_token_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
    kept_BTD = jnp.where(is_token_BT[:, :, None], hidden_BTD.astype(jnp.float32), 0.0)
    mean_BD = kept_BTD.sum(axis=1) / length_B[:, None]
    if not normalize:
        return mean_BD
    return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)
