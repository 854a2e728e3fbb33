"""Cross-entropy of a softmax over the vocabulary, and its gradient by the logits.

The vocabulary is whole, or cut over the mesh's axis `tensor`: then each device makes the logits of
its own part, and what a softmax needs of the others is exchanged a number or two a token. Holds all
the logits it is asked for; does not know how many tokens those are.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.distributed.mesh import automatic, partition_spec


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


# Next-token cross-entropy that never holds the logits of all tokens.
#
# Logits are made, used and dropped a chunk of positions at a time, and on a mesh with a tensor axis
# each device makes those of its own part of the vocabulary only. Their gradient is a by-product of
# the same softmax, so it is taken in the forward pass: three matmuls a chunk where differentiating
# through a checkpoint would do four.

CHUNK_TOKENS = 1024  # positions, over the rows of one device, whose logits exist at once

Arrays = tuple[jax.Array, ...]


def summed_nll(
    hidden_BTD: jax.Array, output_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """The weighted sum over tokens of -log p(target), in nats, float32.

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
    """The sum to make small, and `summed_nll`, which is the one to report; no gradient is of that.

    The first has more by the z-loss: for each token `z_loss` · log² of its softmax's denominator,
    which keeps logits from drifting away together (Chowdhery et al. 2022, section 5).
    """
    loss, nll = _by_device(hidden_BTD, output_VD, targets_BT, weights_BT, z_loss, False)[0]
    return loss, nll


def _forward(hidden_BTD, output_VD, targets_BT, weights_BT, z_loss):  # type: ignore[no-untyped-def]
    """The sums, and the gradients that the first would pass on for a cotangent of 1."""
    return _by_device(hidden_BTD, output_VD, targets_BT, weights_BT, z_loss, True)


def _backward(z_loss, slopes, cotangents):  # type: ignore[no-untyped-def]
    cotangent = cotangents[0]
    scaled = [(cotangent * slope.astype(jnp.float32)).astype(slope.dtype) for slope in slopes]
    return *scaled, None, None


summed_loss.defvjp(_forward, _backward)


def _by_device(
    hidden_BTD: jax.Array,
    output_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    with_slopes: bool,
) -> tuple[Arrays, Arrays]:
    """The sums and, if wanted, the gradients, each device doing its rows and its vocabulary.

    A vocabulary that the tensor axis does not divide, every device of that axis does whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = automatic(mesh)
    if all(size == 1 for size in sizes.values()):
        share = Share(z_loss, with_slopes)
        return share.sums(hidden_BTD, output_VD, targets_BT, weights_BT)
    rows = partition_spec(("batch",), hidden_BTD.shape[:1], mesh)
    pieces = partition_spec(("vocab",), output_VD.shape[:1], mesh)
    is_cut = pieces[0] is not None and sizes["tensor"] > 1
    one = PartitionSpec()
    return jax.shard_map(
        Share(z_loss, with_slopes, is_cut, rows[0] or ()).sums,
        in_specs=(rows, pieces, rows, rows),
        out_specs=((one, one), (rows, pieces) if with_slopes else ()),
        axis_names=set(sizes),
        check_vma=False,
    )(hidden_BTD, output_VD, targets_BT, weights_BT)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device does: some rows of the batch, all or some pieces of the vocabulary."""

    z_loss: float
    with_slopes: bool  # whether gradients are wanted
    pieces_are_cut: bool = False  # over the tensor axis
    row_axes: str | tuple[str, ...] = ()  # the axes whose devices have other rows

    def sums(
        self,
        hidden_BTD: jax.Array,
        output_VD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
    ) -> tuple[Arrays, Arrays]:
        """The sums over all devices, and this one's part of the gradients."""
        is_gathered = output_VD.shape[1] != hidden_BTD.shape[2]  # sharded by `distributed.fsdp`
        whole_VD = output_VD.astype(hidden_BTD.dtype)
        if is_gathered:
            whole_VD = jax.lax.all_gather(whole_VD, "fsdp", axis=1, tiled=True)
        chunks = _chunked(hidden_BTD, targets_BT, weights_BT)
        totals, hidden_slopes, slope_VD = self._over_chunks(whole_VD, chunks)
        if self.row_axes:
            totals, slope_VD = jax.lax.psum((totals, slope_VD), self.row_axes)
        if not self.with_slopes:
            return totals, ()
        if is_gathered:
            slope_VD = jax.lax.psum_scatter(slope_VD, "fsdp", scatter_dimension=1, tiled=True)
        B, T, D = hidden_BTD.shape
        hidden_slope_BTD = hidden_slopes.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
        if self.pieces_are_cut:
            hidden_slope_BTD = jax.lax.psum(hidden_slope_BTD, "tensor")
        return totals, (hidden_slope_BTD, slope_VD.astype(output_VD.dtype))

    def _over_chunks(self, output_VD: jax.Array, chunks: Arrays) -> tuple[Arrays, Any, Any]:
        """This device's two sums; the gradients by each chunk's hidden states and by the matrix.

        Where none are wanted, these are None and 0.
        """

        def step(carry: Any, chunk: Arrays) -> tuple[Any, Any]:
            loss, nll, output_slope_VD = carry
            hidden_BCD, targets_BC, weights_BC = chunk
            hidden_RD = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])  # R = B·C
            (more_loss, more_nll), slope_RV = summed_cross_entropy(
                hidden_RD,
                output_VD,
                targets_BC.reshape(-1),
                weights_BC.reshape(-1),
                self.z_loss,
                self.pieces_are_cut,
            )
            hidden_slope_BCD = None
            if self.with_slopes:
                hidden_slope_BCD = (slope_RV @ output_VD).reshape(hidden_BCD.shape)
                output_slope_VD += jnp.einsum(
                    "RV,RD->VD", slope_RV, hidden_RD, preferred_element_type=jnp.float32
                )
            return (loss + more_loss, nll + more_nll, output_slope_VD), hidden_slope_BCD

        zero = jnp.float32(0)
        start = jnp.zeros(output_VD.shape if self.with_slopes else (), jnp.float32)
        (loss, nll, output_slope_VD), hidden_slopes = jax.lax.scan(
            step, (zero, zero, start), chunks
        )
        return (loss, nll), hidden_slopes, output_slope_VD


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
