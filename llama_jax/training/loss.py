"""Next-token cross-entropy that never holds the logits of all tokens.

Logits are computed, used and dropped a chunk of positions at a time. Where the vocabulary is
sharded over the mesh's axis `tensor`, each device computes the logits of its shard, and the softmax
exchanges two numbers per token. The gradient by the logits is a by-product of the same softmax, so
it is computed in the forward pass: three matmuls per chunk, where differentiating through
`jax.checkpoint` takes four.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from llama_jax.distributed.mesh import automatic, partition_spec


def summed_cross_entropy(
    hidden_RD: jax.Array,
    output_VD: jax.Array,
    targets_R: jax.Array,
    weights_R: jax.Array,
    z_loss: float,
    is_sharded: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Return ((loss, nll), gradient of the loss by the logits [R, V]) for R tokens.

    `nll` is the weighted sum of -log p(target) in nats; `loss` adds the z-loss, `z_loss` · log² of
    each softmax's denominator. Both are float32; the gradient has the dtype of `hidden_RD`.

    Args:
      targets_R: index of each token's target in the whole vocabulary.
      is_sharded: whether `output_VD` is this device's shard inside `jax.shard_map` over `tensor`.
    """
    logits_RV = jnp.einsum("RD,VD->RV", hidden_RD, output_VD, preferred_element_type=jnp.float32)
    V = logits_RV.shape[1]
    first = jax.lax.axis_index("tensor") * V if is_sharded else jnp.int32(0)
    target_R1, weights_R1 = targets_R[:, None] - first, weights_R[:, None]
    log_sum_and_target = _sharded_softmax if is_sharded else _softmax
    log_sum_R1, chosen_R1 = log_sum_and_target(logits_RV, target_R1)
    nll = jnp.sum((log_sum_R1 - chosen_R1) * weights_R1)
    loss = nll + z_loss * jnp.sum(log_sum_R1**2 * weights_R1) if z_loss else nll
    is_target_RV = target_R1 == jnp.arange(V)[None]
    probability_RV = jnp.exp(logits_RV - log_sum_R1)
    if z_loss:
        probability_RV *= 1 + 2 * z_loss * log_sum_R1
    gradient_RV = (probability_RV - is_target_RV.astype(jnp.float32)) * weights_R1
    return (loss, nll), gradient_RV.astype(hidden_RD.dtype)


def _softmax(logits_RV: jax.Array, target_R1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log of the softmax's denominator and the target's logit, each [R, 1]."""
    log_sum_R1 = jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    return log_sum_R1, jnp.take_along_axis(logits_RV, target_R1, axis=-1)


def _sharded_softmax(logits_RV: jax.Array, target_R1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what `_softmax` does for the whole vocabulary; most targets are on other devices."""
    V = logits_RV.shape[1]
    is_here_R1 = (target_R1 >= 0) & (target_R1 < V)
    chosen_R1 = jnp.take_along_axis(logits_RV, jnp.clip(target_R1, 0, V - 1), axis=-1)
    highest_R1 = jax.lax.pmax(logits_RV.max(axis=-1, keepdims=True), "tensor")
    sum_R1 = jnp.exp(logits_RV - highest_R1).sum(axis=-1, keepdims=True)
    parts = (sum_R1, jnp.where(is_here_R1, chosen_R1, 0.0))
    sum_R1, chosen_R1 = jax.lax.psum(parts, "tensor")
    return highest_R1 + jnp.log(sum_R1), chosen_R1


# ---- in chunks, over devices ----

CHUNK_TOKENS = 1024  # positions of one device whose logits exist at once, over its sequences

Arrays = tuple[jax.Array, ...]


def summed_nll(
    hidden_BTD: jax.Array, output_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Return the weighted sum over tokens of -log p(target), in nats, float32.

    Divide by the sum of the weights for the mean. Gradients flow to `hidden_BTD` and `output_VD`.
    """
    return summed_loss(hidden_BTD, output_VD, targets_BT, weights_BT, 0.0)[0]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_loss(
    hidden_BTD: jax.Array,
    output_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss to minimise, and `summed_nll` to report, which has no gradient.

    The loss adds the z-loss: for each token `z_loss` · log² of its softmax's denominator, which
    keeps logits from drifting away together (Chowdhery et al. 2022, section 5).
    """
    loss, nll = _by_device(hidden_BTD, output_VD, targets_BT, weights_BT, z_loss, "none")[0]
    return loss, nll


def _forward(hidden_BTD, output_VD, targets_BT, weights_BT, z_loss):  # type: ignore[no-untyped-def]
    """Return the sums, and the gradients of the loss for a cotangent of 1.

    None is computed for an output matrix that is frozen.
    """
    arrays = [x.value for x in (hidden_BTD, output_VD, targets_BT, weights_BT)]
    gradients = "both" if output_VD.perturbed else "hidden"
    return _by_device(*arrays, z_loss, gradients)


def _backward(z_loss, gradients, cotangents):  # type: ignore[no-untyped-def]
    cotangent = cotangents[0]
    if isinstance(cotangent, SymbolicZero):  # what is reported has no gradient
        return (None,) * 4
    scaled = [(cotangent * x.astype(jnp.float32)).astype(x.dtype) for x in gradients]
    return *scaled, *[None] * (4 - len(scaled))


summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _by_device(
    hidden_BTD: jax.Array,
    output_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    gradients: str,
) -> tuple[Arrays, Arrays]:
    """Return the sums, and the gradients that `Shard.gradients` names.

    Each device computes its own shard. A vocabulary that the tensor axis does not divide is
    computed by every device of that axis.
    """
    shard, rows, vocab, axes = _sharded(hidden_BTD, output_VD, Shard(z_loss, gradients))
    arrays = (hidden_BTD, output_VD, targets_BT, weights_BT)
    if not axes:
        return shard.sums(*arrays)
    one = PartitionSpec()
    return jax.shard_map(
        shard.sums,
        in_specs=(rows, vocab, rows, rows),
        out_specs=((one, one), (rows, vocab)[: GRADIENTS.index(gradients)]),
        axis_names=axes,
        check_vma=False,
    )(*arrays)


def _sharded(
    hidden_BTD: jax.Array, output_VD: jax.Array, shard: "Shard"
) -> tuple["Shard", PartitionSpec, PartitionSpec, set[str]]:
    """Return how a device computes on the mesh, the specs of rows and vocabulary, and the axes.

    No axes: there is one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = automatic(mesh)
    rows = partition_spec(("batch",), hidden_BTD.shape[:1], mesh)
    vocab = partition_spec(("vocab",), output_VD.shape[:1], mesh)
    if all(size == 1 for size in sizes.values()):
        return shard, rows, vocab, set()
    is_sharded = vocab[0] is not None and sizes["tensor"] > 1
    shard = dataclasses.replace(shard, vocab_is_sharded=is_sharded, row_axes=rows[0] or ())
    return shard, rows, vocab, set(sizes)


def target_logprobs(
    hidden_BTD: jax.Array, output_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return each target's log-probability in nats, and whether no token is more probable.

    Float32 and bool, [B, T]; without gradients, computed in the same chunks as the loss.
    """
    shard, rows, vocab, axes = _sharded(hidden_BTD, output_VD, Shard(0.0, "none"))
    function: Callable[..., tuple[jax.Array, jax.Array]] = shard.logprobs
    arrays = jax.lax.stop_gradient((hidden_BTD, output_VD, targets_BT))
    if not axes:
        return function(*arrays)
    return jax.shard_map(
        function,
        in_specs=(rows, vocab, rows),
        out_specs=(rows, rows),
        axis_names=axes,
        check_vma=False,
    )(*arrays)


GRADIENTS = ("none", "hidden", "both")


@dataclasses.dataclass(frozen=True)
class Shard:
    """The computation of one device: its sequences, and its shard of the vocabulary or all."""

    z_loss: float
    gradients: str  # that are computed: of `GRADIENTS`, by hidden states or also by the matrix
    vocab_is_sharded: bool = False  # over the tensor axis
    row_axes: str | tuple[str, ...] = ()  # mesh axes over which sequences are sharded

    def sums(
        self,
        hidden_BTD: jax.Array,
        output_VD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
    ) -> tuple[Arrays, Arrays]:
        """Return the sums over all devices, and this device's shard of the gradients."""
        gathered_VD, is_gathered = _gathered(output_VD, hidden_BTD)
        chunks = _chunked(hidden_BTD, targets_BT, weights_BT)
        totals, hidden_gradients, gradient_VD = self._over_chunks(gathered_VD, chunks)
        if self.row_axes:
            totals, gradient_VD = jax.lax.psum((totals, gradient_VD), self.row_axes)
        if self.gradients == "none":
            return totals, ()
        B, T, D = hidden_BTD.shape
        hidden_gradient_BTD = hidden_gradients.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
        if self.vocab_is_sharded:
            hidden_gradient_BTD = jax.lax.psum(hidden_gradient_BTD, "tensor")
        if self.gradients == "hidden":
            return totals, (hidden_gradient_BTD,)
        if is_gathered:
            gradient_VD = jax.lax.psum_scatter(gradient_VD, "fsdp", scatter_dimension=1, tiled=True)
        return totals, (hidden_gradient_BTD, gradient_VD.astype(output_VD.dtype))

    def logprobs(
        self, hidden_BTD: jax.Array, output_VD: jax.Array, targets_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the log-probability of each of this device's targets, and whether it is top."""
        gathered_VD, _ = _gathered(output_VD, hidden_BTD)
        V = gathered_VD.shape[0]

        def of_chunk(chunk: Arrays) -> Arrays:
            hidden_RD = chunk[0].reshape(-1, hidden_BTD.shape[2])  # R = B·C
            logits_RV = jnp.einsum(
                "RD,VD->RV", hidden_RD, gathered_VD, preferred_element_type=jnp.float32
            )
            highest_R1 = logits_RV.max(axis=-1, keepdims=True)
            target_R1 = chunk[1].reshape(-1, 1)
            if self.vocab_is_sharded:
                target_R1 -= jax.lax.axis_index("tensor") * V
                highest_R1 = jax.lax.pmax(highest_R1, "tensor")
                log_sum_R1, chosen_R1 = _sharded_softmax(logits_RV, target_R1)
            else:
                log_sum_R1, chosen_R1 = _softmax(logits_RV, target_R1)
            found = chosen_R1 - log_sum_R1, chosen_R1 >= highest_R1
            return tuple(x.reshape(chunk[1].shape) for x in found)

        found = jax.lax.map(of_chunk, _chunked(hidden_BTD, targets_BT))
        B, T = targets_BT.shape
        logprobs_BT, is_top_BT = (x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in found)
        return logprobs_BT, is_top_BT

    def _over_chunks(self, output_VD: jax.Array, chunks: Arrays) -> tuple[Arrays, Any, Any]:
        """Return this device's sums, and the gradients by hidden states (per chunk) and matrix.

        Gradients that are not wanted are None and 0.
        """

        def step(carry: Any, chunk: Arrays) -> tuple[Any, Any]:
            loss, nll, output_gradient_VD = carry
            hidden_BCD, targets_BC, weights_BC = chunk
            hidden_RD = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])  # R = B·C
            (more_loss, more_nll), gradient_RV = summed_cross_entropy(
                hidden_RD,
                output_VD,
                targets_BC.reshape(-1),
                weights_BC.reshape(-1),
                self.z_loss,
                self.vocab_is_sharded,
            )
            hidden_gradient_BCD = None
            if self.gradients != "none":
                hidden_gradient_BCD = (gradient_RV @ output_VD).reshape(hidden_BCD.shape)
            if self.gradients == "both":
                output_gradient_VD += jnp.einsum(
                    "RV,RD->VD", gradient_RV, hidden_RD, preferred_element_type=jnp.float32
                )
            return (loss + more_loss, nll + more_nll, output_gradient_VD), hidden_gradient_BCD

        zero = jnp.float32(0)
        start = jnp.zeros(output_VD.shape if self.gradients == "both" else (), jnp.float32)
        (loss, nll, output_gradient_VD), hidden_gradients = jax.lax.scan(
            step, (zero, zero, start), chunks
        )
        return (loss, nll), hidden_gradients, output_gradient_VD


def _gathered(output_VD: jax.Array, hidden_BTD: jax.Array) -> tuple[jax.Array, bool]:
    """Return the matrix in the dtype of the hidden states, and whether it had to be gathered."""
    is_gathered = output_VD.shape[1] != hidden_BTD.shape[2]  # sharded by `distributed.fsdp`
    gathered_VD = output_VD.astype(hidden_BTD.dtype)
    if is_gathered:
        gathered_VD = jax.lax.all_gather(gathered_VD, "fsdp", axis=1, tiled=True)
    return gathered_VD, is_gathered


def _chunked(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return each [B, T, …] array as [chunks, B, C, …]: sequences stay on their devices.

    All chunks have equal length; the last one is padded with zeros, whose weight is 0.
    """
    B, T = arrays[0].shape[:2]
    chunks = -(-T // max(1, CHUNK_TOKENS // B))
    C = -(-T // chunks)

    def split(array: jax.Array) -> jax.Array:
        filled = jnp.pad(array, [(0, 0), (0, chunks * C - T)] + [(0, 0)] * (array.ndim - 2))
        return filled.reshape(B, chunks, C, *array.shape[2:]).swapaxes(0, 1)

    return tuple(split(array) for array in arrays)
