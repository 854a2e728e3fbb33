"""Next-token cross-entropy that never holds the logits of all tokens.

Logits are made, used and dropped a chunk of positions at a time. Their gradient is a by-product
of the same softmax, so it is taken in the forward pass: three matmuls a chunk where
differentiating through a checkpoint would do four.
"""

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024  # positions, over all rows, whose logits exist at once

Chunk = tuple[jax.Array, ...]


@jax.custom_vjp
def summed_nll(
    hidden_BTD: jax.Array, output_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """The weighted sum over tokens of -log p(target), in nats, float32.

    Divide by the sum of the weights for the mean. Gradients flow to `hidden_BTD` and `output_VD`.
    """
    output_VD = output_VD.astype(hidden_BTD.dtype)

    def step(total: jax.Array, chunk: Chunk) -> tuple[jax.Array, None]:
        return total + _nll(output_VD, *chunk)[0], None

    chunks = _chunked(hidden_BTD, targets_BT, weights_BT)
    return jax.lax.scan(step, jnp.float32(0), chunks)[0]


def _nll(
    output_VD: jax.Array, hidden_BCD: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk's weighted sum, its float32 logits [R, V] and their log-sum-exp [R, 1]; R = B·C."""
    hidden_RD = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
    logits_RV = jnp.einsum("RD,VD->RV", hidden_RD, output_VD, preferred_element_type=jnp.float32)
    log_sum_R1 = jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    chosen_R1 = jnp.take_along_axis(logits_RV, targets_BC.reshape(-1, 1), axis=-1)
    total = jnp.sum((log_sum_R1 - chosen_R1)[:, 0] * weights_BC.reshape(-1))
    return total, logits_RV, log_sum_R1


def _forward(hidden_BTD, output_VD, targets_BT, weights_BT):  # type: ignore[no-untyped-def]
    """The sum, and the gradients it would pass on for a cotangent of 1."""
    output_cast_VD = output_VD.astype(hidden_BTD.dtype)

    def step(carry, chunk):  # type: ignore[no-untyped-def]
        total, output_slope_VD = carry
        hidden_BCD, targets_BC, weights_BC = chunk
        added, logits_RV, log_sum_R1 = _nll(output_cast_VD, *chunk)
        is_target_RV = targets_BC.reshape(-1, 1) == jnp.arange(logits_RV.shape[-1])[None]
        slope_RV = jnp.exp(logits_RV - log_sum_R1) - is_target_RV.astype(jnp.float32)
        slope_RV = (slope_RV * weights_BC.reshape(-1, 1)).astype(hidden_BCD.dtype)
        hidden_slope_BCD = (slope_RV @ output_cast_VD).reshape(hidden_BCD.shape)
        hidden_RD = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
        output_slope_VD += jnp.einsum(
            "RV,RD->VD", slope_RV, hidden_RD, preferred_element_type=jnp.float32
        )
        return (total + added, output_slope_VD), hidden_slope_BCD

    start = (jnp.float32(0), jnp.zeros(output_VD.shape, jnp.float32))
    chunks = _chunked(hidden_BTD, targets_BT, weights_BT)
    (total, output_slope_VD), hidden_slopes = jax.lax.scan(step, start, chunks)
    B, T, D = hidden_BTD.shape
    hidden_slope_BTD = hidden_slopes.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
    return total, (hidden_slope_BTD, output_slope_VD.astype(output_VD.dtype))


def _backward(slopes, cotangent):  # type: ignore[no-untyped-def]
    scaled = [(cotangent * slope.astype(jnp.float32)).astype(slope.dtype) for slope in slopes]
    return *scaled, None, None


summed_nll.defvjp(_forward, _backward)


def _chunked(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [B, T, …] array as [chunks, B, C, …]: rows stay on their devices, positions are cut.

    Chunks are of equal length, so the last one is filled up with zeros: they weigh nothing.
    """
    B, T = arrays[0].shape[:2]
    chunks = -(-T // max(1, CHUNK_TOKENS // B))
    C = -(-T // chunks)

    def cut(array: jax.Array) -> jax.Array:
        filled = jnp.pad(array, [(0, 0), (0, chunks * C - T)] + [(0, 0)] * (array.ndim - 2))
        return filled.reshape(B, chunks, C, *array.shape[2:]).swapaxes(0, 1)

    return tuple(cut(array) for array in arrays)
