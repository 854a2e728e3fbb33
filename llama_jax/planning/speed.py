"""What bounds the speed of a step, predicted from FLOPs, bytes and data sheets.

Each limit is computed as if it were the only one and fully reached, so real steps are slower: the
figures are for comparing plans.
"""

import dataclasses
import math

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
from llama_jax.planning.memory import FLOAT32, Memory

QKV = ("blocks.attention.wq", "blocks.attention.wk", "blocks.attention.wv")


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
    devices = math.prod(mesh.shape.values())
    flops = config.tokens_per_step * _flops_per_token(config)
    return Speed(
        arithmetic=flops / devices / chip.flops,
        memory=_memory_traffic(config, mesh, memory) / chip.bandwidth,
        network=_bytes_sent(config, mesh) / (chip.link / 2),  # a chip sends in one direction of two
    )


def _flops_per_token(config: Config) -> float:
    """Return training FLOPs per token, recomputation included."""
    model = config.model
    once = flops_per_token(model, config.data.sequence_length)
    if config.run.remat == "none":
        return once
    recomputed = once - 6 * table_parameters(model)  # all but the output matrix
    if config.run.remat in ("save-qkv", "offload"):
        recomputed -= 6 * sum(one.total for one in matrices(model) if one.name in QKV)
    return once + recomputed / 3  # a forward pass is a third of a step


def _passes(config: Config) -> int:
    """Return how often a microbatch reads the weights: forward, backward, and recomputation."""
    return 2 if config.run.remat == "none" else 3


def _memory_traffic(config: Config, mesh: AbstractMesh, memory: Memory) -> float:
    """Return the bytes per step between one device and its memory."""
    width = jnp.dtype(config.model.compute_dtype).itemsize
    microbatches = config.optimizer.accumulation_steps
    weights = count_parameters(config.model) / mesh.shape["tensor"]
    batch = config.microbatch_size / batch_shards(mesh)
    logits = batch * config.data.sequence_length * config.model.vocab_size / mesh.shape["tensor"]
    each = (
        _passes(config) * weights * width
        + 4 * memory.parameters  # gradients written and read, their sums read and written
        + 2 * memory.activations
        + 4 * logits * FLOAT32
    )
    return microbatches * each + 2 * (memory.parameters + memory.optimizer) + memory.parameters


def _bytes_sent(config: Config, mesh: AbstractMesh) -> float:
    """Return the bytes per step that one device sends, every collective being a ring."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    width = jnp.dtype(config.model.compute_dtype).itemsize
    microbatches = config.optimizer.accumulation_steps
    weights = count_parameters(config.model) / tensor
    table = table_parameters(config.model) / tensor
    batch = config.microbatch_size / (data * fsdp)
    stream = batch * config.data.sequence_length * config.model.dim * width
    blocks = weights - (1 if config.model.tied_embeddings else 2) * table
    # Blocks are gathered twice and their gradients scattered once, all in the compute dtype. The
    # output matrix is gathered once, and its gradient, a sum over chunks, scattered in float32. Of
    # the embedding only the rows looked up are exchanged, and their gradients.
    through_fsdp = 3 * blocks * width + table * (width + FLOAT32) + 2 * stream
    # Each block reduces its stream over the tensor axis twice forward, twice backward.
    exchanges = config.model.num_layers * 2 * _passes(config)
    summed = exchanges * 2 * (tensor - 1) / tensor * stream
    reduced = 2 * (data - 1) / data * weights / fsdp * FLOAT32  # once a step
    return microbatches * ((fsdp - 1) / fsdp * through_fsdp + summed) + reduced
