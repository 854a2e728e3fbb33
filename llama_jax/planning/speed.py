"""What bounds the speed of a step, predicted from FLOPs, bytes and data sheets.

Each limit is computed as if it were the only one and fully reached, so real steps are slower: the
figures are for comparing plans.
"""

import dataclasses

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from llama_jax.config import Config
from llama_jax.distributed.mesh import batch_shards
from llama_jax.hardware.accelerators import Chip
from llama_jax.model.parameters import (
    count_parameters,
    flops_per_token,
    matrices,
    table_parameters,
)
from llama_jax.planning.memory import FLOAT32, Memory, remat_policy

QKV = ("blocks.attention.wq", "blocks.attention.wk", "blocks.attention.wv")
OUTPUT = "blocks.attention.wo"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds per step if one resource alone bounded it."""

    arithmetic: float
    memory: float  # traffic between chips and their own memory
    network: float  # traffic between chips

    @property
    def seconds(self) -> float:
        """The least that a step can take."""
        return max(self.arithmetic, self.memory, self.network)

    @property
    def bottleneck(self) -> str:
        """What bounds it: "arithmetic", "memory" or "network"."""
        limits = dataclasses.asdict(self)
        return max(limits, key=lambda name: limits[name])


def training_speed(config: Config, mesh: AbstractMesh, chip: Chip, memory: Memory) -> Speed:
    """Return the prediction for a mesh, with textbook counts of the collectives."""
    model, microbatches = config.model, config.optimizer.accumulation_steps
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    width = jnp.dtype(model.compute_dtype).itemsize
    weights, table = count_parameters(model) / tensor, table_parameters(model) / tensor
    tokens = config.microbatch_size / batch_shards(mesh) * config.data.sequence_length
    remat = remat_policy(config, chip)
    passes = 2 if remat in ("none", "save-matmuls") else 3  # that read the weights

    trained, stored = memory.parameters, weights * width  # bytes that have gradients, or are read
    if config.lora.rank:
        moment = jnp.dtype(config.optimizer.moments_dtype).itemsize
        trained = memory.optimizer / 2 / moment * FLOAT32  # there are two moments
        stored = memory.parameters
    each = (
        passes * stored
        + 4 * trained  # gradients written and read, their sums read and written
        + 2 * memory.activations
        + 4 * tokens * model.vocab_size / tensor * FLOAT32  # logits
    )
    traffic = microbatches * each + 2 * (trained + memory.optimizer) + trained

    # Bytes that one device sends, every collective being a ring. Blocks are gathered twice and
    # their gradients scattered once, all in the compute dtype. The output matrix is gathered once,
    # and its gradient, a sum over chunks, scattered in float32. Of the embedding only the rows
    # looked up are exchanged, and their gradients.
    stream = tokens * model.dim * width
    blocks = weights - (1 if model.tied_embeddings else 2) * table
    through_fsdp = 3 * blocks * width + table * (width + FLOAT32) + 2 * stream
    # Each block reduces its stream over the tensor axis twice forward, twice backward.
    summed = model.num_layers * 2 * passes * 2 * (tensor - 1) / tensor * stream
    reduced = 2 * (data - 1) / data * weights / fsdp * FLOAT32  # once a step
    sent = microbatches * ((fsdp - 1) / fsdp * through_fsdp + summed) + reduced
    return Speed(
        arithmetic=config.tokens_per_step
        * _flops_per_token(config, remat)
        / mesh.size
        / chip.flops,
        memory=traffic / chip.bandwidth,
        network=sent / (chip.link / 2),  # a chip sends in one direction of two
    )


def _flops_per_token(config: Config, remat: str) -> float:
    """Return training FLOPs per token, recomputation included.

    Adapters are not counted, only that what they leave frozen has no gradients.
    """
    model, length = config.model, config.data.sequence_length
    once = flops_per_token(model, length, is_frozen=config.lora.rank > 0)
    if remat == "none":
        return once
    if remat == "save-matmuls":
        return once + sum(2 * one.total for one in matrices(model) if one.name == OUTPUT)
    recomputed = flops_per_token(model, length)
    recomputed -= 6 * table_parameters(model)  # all but the output matrix
    if remat in ("save-qkv", "offload"):
        recomputed -= 6 * sum(one.total for one in matrices(model) if one.name in QKV)
    return once + recomputed / 3  # a forward pass is a third of a step
