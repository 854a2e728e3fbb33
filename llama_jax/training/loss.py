"""Next-token cross-entropy that never holds the logits of all tokens.

Logits are made, used and dropped a chunk of positions at a time, and on a mesh with a tensor axis
each device makes those of its own part of the vocabulary only. Their gradient is a by-product of
the same softmax, so it is taken in the forward pass: three matmuls a chunk where differentiating
through a checkpoint would do four.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.parallel.sharding import automatic, partition_spec

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

    A vocabulary that the tensor axis does not divide is filled up with pieces of no probability.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes, V = automatic(mesh), output_VD.shape[0]
    if all(size == 1 for size in sizes.values()):
        share = Share(V, z_loss, with_slopes)
        return share.sums(hidden_BTD, output_VD, targets_BT, weights_BT)
    rows = partition_spec(("batch",), hidden_BTD.shape[:1], mesh)[0]
    share = Share(V, z_loss, with_slopes, sizes["tensor"] > 1, rows or ())
    row, piece, one = PartitionSpec(rows), PartitionSpec("tensor"), PartitionSpec()
    sums, slopes = jax.shard_map(
        share.sums,
        in_specs=(row, piece, row, row),
        out_specs=((one, one), (row, piece) if with_slopes else ()),
        axis_names=set(sizes),
        check_vma=False,
    )(hidden_BTD, _filled_up(output_VD, sizes["tensor"]), targets_BT, weights_BT)
    return sums, (slopes[0], slopes[1][:V]) if with_slopes else ()


def _filled_up(output_VD: jax.Array, parts: int) -> jax.Array:
    """The matrix with as many more rows as it takes to cut it into equal parts."""
    return jnp.pad(output_VD, [(0, -output_VD.shape[0] % parts), (0, 0)])


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device does: some rows of the batch, some pieces of the vocabulary."""

    vocabulary: int  # pieces in all
    z_loss: float
    with_slopes: bool  # whether gradients are wanted
    pieces_are_cut: bool = False  # over the tensor axis
    row_axes: str | Arrays = ()  # the axes whose devices have other rows

    def sums(
        self,
        hidden_BTD: jax.Array,
        output_VD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
    ) -> tuple[Arrays, Arrays]:
        """The sums over all devices, and this one's part of the gradients."""
        is_cut = output_VD.shape[1] != hidden_BTD.shape[2]  # by `data_parallel`
        whole_VD = output_VD.astype(hidden_BTD.dtype)
        if is_cut:
            whole_VD = jax.lax.all_gather(whole_VD, "fsdp", axis=1, tiled=True)

        def step(carry: Any, chunk: Arrays) -> tuple[Any, Any]:
            loss, nll, output_slope_VD = carry
            added, slope_RV = self._chunk(whole_VD, *chunk)
            carry = (loss + added[0], nll + added[1], output_slope_VD)
            if not self.with_slopes:
                return carry, None
            hidden_BCD = chunk[0]
            hidden_RD = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
            output_slope_VD += jnp.einsum(
                "RV,RD->VD", slope_RV, hidden_RD, preferred_element_type=jnp.float32
            )
            return (*carry[:2], output_slope_VD), (slope_RV @ whole_VD).reshape(hidden_BCD.shape)

        zero = jnp.float32(0)
        start = jnp.zeros(whole_VD.shape if self.with_slopes else (), jnp.float32)
        chunks = _chunked(hidden_BTD, targets_BT, weights_BT)
        (*sums, output_slope_VD), hidden_slopes = jax.lax.scan(step, (zero, zero, start), chunks)
        totals = jax.lax.psum(tuple(sums), self.row_axes) if self.row_axes else tuple(sums)
        if not self.with_slopes:
            return totals, ()
        if self.row_axes:
            output_slope_VD = jax.lax.psum(output_slope_VD, self.row_axes)
        if is_cut:
            output_slope_VD = jax.lax.psum_scatter(
                output_slope_VD, "fsdp", scatter_dimension=1, tiled=True
            )
        B, T, D = hidden_BTD.shape
        hidden_slope_BTD = hidden_slopes.swapaxes(0, 1).reshape(B, -1, D)[:, :T]
        if self.pieces_are_cut:
            hidden_slope_BTD = jax.lax.psum(hidden_slope_BTD, "tensor")
        return totals, (hidden_slope_BTD, output_slope_VD.astype(output_VD.dtype))

    def _chunk(
        self,
        output_VD: jax.Array,
        hidden_BCD: jax.Array,
        targets_BC: jax.Array,
        weights_BC: jax.Array,
    ) -> tuple[Arrays, jax.Array]:
        """One chunk's two sums, and their slope by this device's logits [R, V]; R = B·C."""
        hidden_RD = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
        logits_RV = jnp.einsum(
            "RD,VD->RV", hidden_RD, output_VD, preferred_element_type=jnp.float32
        )
        V = logits_RV.shape[1]
        first = jax.lax.axis_index("tensor") * V if self.pieces_are_cut else jnp.int32(0)
        if self.pieces_are_cut and self.vocabulary % V:
            exists_V = first + jnp.arange(V) < self.vocabulary
            logits_RV = jnp.where(exists_V[None], logits_RV, -jnp.inf)
        target_R1 = targets_BC.reshape(-1, 1) - first
        log_sum_R1, chosen_R1 = self._log_sum_and_chosen(logits_RV, target_R1)
        weights_R1 = weights_BC.reshape(-1, 1)
        nll = jnp.sum((log_sum_R1 - chosen_R1) * weights_R1)
        loss = nll + self.z_loss * jnp.sum(log_sum_R1**2 * weights_R1) if self.z_loss else nll
        is_target_RV = target_R1 == jnp.arange(V)[None]
        share_RV = jnp.exp(logits_RV - log_sum_R1)
        if self.z_loss:
            share_RV *= 1 + 2 * self.z_loss * log_sum_R1
        slope_RV = (share_RV - is_target_RV.astype(jnp.float32)) * weights_R1
        return (loss, nll), slope_RV.astype(hidden_BCD.dtype)

    def _log_sum_and_chosen(
        self, logits_RV: jax.Array, target_R1: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The log of the softmax's denominator and the target's logit, of the whole vocabulary."""
        if not self.pieces_are_cut:
            log_sum_R1 = jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
            return log_sum_R1, jnp.take_along_axis(logits_RV, target_R1, axis=-1)
        V = logits_RV.shape[1]
        is_here_R1 = (target_R1 >= 0) & (target_R1 < V)
        chosen_R1 = jnp.take_along_axis(logits_RV, jnp.clip(target_R1, 0, V - 1), axis=-1)
        highest_R1 = jax.lax.pmax(logits_RV.max(axis=-1, keepdims=True), "tensor")
        sum_R1 = jnp.exp(logits_RV - highest_R1).sum(axis=-1, keepdims=True)
        parts = (sum_R1, jnp.where(is_here_R1, chosen_R1, 0.0))
        sum_R1, chosen_R1 = jax.lax.psum(parts, "tensor")
        return highest_R1 + jnp.log(sum_R1), chosen_R1


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
