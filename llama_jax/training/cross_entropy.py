"""Cross-entropy of a softmax over the vocabulary, and its gradient by the logits.

The vocabulary is whole, or cut over the mesh's axis `tensor`: then each device makes the logits of
its own part, and what a softmax needs of the others is exchanged a number or two a token. Holds all
the logits it is asked for; does not know how many tokens those are.
"""

import jax
import jax.numpy as jnp


def summed_cross_entropy(
    hidden_RD: jax.Array,
    output_VD: jax.Array,
    targets_R: jax.Array,
    weights_R: jax.Array,
    z_loss: float,
    is_cut: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Two weighted sums over R tokens, in nats, and the first one's gradient by the logits [R, V].

    The second is of -log p(target); the first has more by the z-loss: `z_loss` · log² of each
    softmax's denominator. Sums are float32 and the gradient has the dtype of `hidden_RD`.

    Args:
      targets_R: the number of each token's target in the whole vocabulary.
      is_cut: whether `output_VD` is this device's part, as `jax.shard_map` over `tensor` hands it.
    """
    logits_RV = jnp.einsum("RD,VD->RV", hidden_RD, output_VD, preferred_element_type=jnp.float32)
    V = logits_RV.shape[1]
    first = jax.lax.axis_index("tensor") * V if is_cut else jnp.int32(0)
    target_R1, weights_R1 = targets_R[:, None] - first, weights_R[:, None]
    denominator_and_target = _over_devices if is_cut else _on_one_device
    log_sum_R1, chosen_R1 = denominator_and_target(logits_RV, target_R1)
    nll = jnp.sum((log_sum_R1 - chosen_R1) * weights_R1)
    loss = nll + z_loss * jnp.sum(log_sum_R1**2 * weights_R1) if z_loss else nll
    is_target_RV = target_R1 == jnp.arange(V)[None]
    share_RV = jnp.exp(logits_RV - log_sum_R1)
    if z_loss:
        share_RV *= 1 + 2 * z_loss * log_sum_R1
    slope_RV = (share_RV - is_target_RV.astype(jnp.float32)) * weights_R1
    return (loss, nll), slope_RV.astype(hidden_RD.dtype)


def _on_one_device(logits_RV: jax.Array, target_R1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log of the softmax's denominator and the target's logit, [R, 1]."""
    log_sum_R1 = jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    return log_sum_R1, jnp.take_along_axis(logits_RV, target_R1, axis=-1)


def _over_devices(logits_RV: jax.Array, target_R1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of the whole vocabulary; most targets are in the part of another device."""
    V = logits_RV.shape[1]
    is_here_R1 = (target_R1 >= 0) & (target_R1 < V)
    chosen_R1 = jnp.take_along_axis(logits_RV, jnp.clip(target_R1, 0, V - 1), axis=-1)
    highest_R1 = jax.lax.pmax(logits_RV.max(axis=-1, keepdims=True), "tensor")
    sum_R1 = jnp.exp(logits_RV - highest_R1).sum(axis=-1, keepdims=True)
    parts = (sum_R1, jnp.where(is_here_R1, chosen_R1, 0.0))
    sum_R1, chosen_R1 = jax.lax.psum(parts, "tensor")
    return highest_R1 + jnp.log(sum_R1), chosen_R1
