"""What bounds the speed of a step, predicted from operations and bytes and from data sheets alone.

Each limit is taken as if it were the only one and reached in full, so real steps are slower: use
the figures to compare plans, not as promises. Nothing here is measured.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from llama_jax.config import Config, ModelConfig
from llama_jax.distributed.mesh import batch_shards
from llama_jax.hardware.accelerators import Chip
from llama_jax.model.parameters import count_parameters, flops_per_token
from llama_jax.planning.memory import FLOAT32, Memory


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds a step would take if one thing alone bounded it."""

    arithmetic: float
    memory: float  # between chips and their own memory
    network: float  # between chips

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
    """The prediction for a mesh, with textbook counts of what goes over the network."""
    devices = math.prod(mesh.shape.values())
    flops = config.tokens_per_step * _flops_per_token(config)
    return Speed(
        arithmetic=flops / devices / chip.flops,
        memory=_traffic(config, mesh, memory) / chip.bandwidth,
        network=_sent(config, mesh) / (chip.link / 2),  # a chip sends in one direction of two
    )


def _flops_per_token(config: Config) -> float:
    """Training FLOPs a token, what rematerialisation does again included."""
    once = _flops_once(config.model, config.data.sequence_length)
    if config.run.remat == "none":
        return once
    # All but the output matrix is run again.
    again = once - 6 * config.model.vocab_size * config.model.dim
    if config.run.remat in ("save-qkv", "offload"):
        heads = config.model.num_heads + 2 * config.model.num_kv_heads
        qkv = config.model.num_layers * config.model.dim * heads * config.model.head_dim
        again -= 6 * qkv
    return once + again / 3  # a forward pass is a third of a step


_flops_once = functools.cache(flops_per_token)
_parameters = functools.cache(count_parameters)


def _passes(config: Config) -> int:
    """How often a microbatch reads the weights: forward, backward, and forward again."""
    return 2 if config.run.remat == "none" else 3


def _traffic(config: Config, mesh: AbstractMesh, memory: Memory) -> float:
    """Bytes a step between one device and its memory."""
    width = jnp.dtype(config.model.compute_dtype).itemsize
    microbatches = config.optimizer.accumulation_steps
    weights = _parameters(config.model) / mesh.shape["tensor"]
    rows = config.microbatch_size / batch_shards(mesh)
    logits = rows * config.data.sequence_length * config.model.vocab_size / mesh.shape["tensor"]
    each = (
        _passes(config) * weights * width
        + 4 * memory.parameters  # gradients written and read, their sums read and written
        + 2 * memory.activations
        + 4 * logits * FLOAT32
    )
    return microbatches * each + 2 * (memory.parameters + memory.optimizer) + memory.parameters


def _sent(config: Config, mesh: AbstractMesh) -> float:
    """Bytes a step that one device sends, if every exchange went round in a ring."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    width = jnp.dtype(config.model.compute_dtype).itemsize
    microbatches = config.optimizer.accumulation_steps
    weights = _parameters(config.model) / tensor
    table = config.model.vocab_size * config.model.dim / tensor
    rows = config.microbatch_size / (data * fsdp)
    stream = rows * config.data.sequence_length * config.model.dim * width
    blocks = weights - _tables(config.model) * table
    # Blocks are gathered twice and their gradients scattered once, all in the compute dtype. The
    # output matrix is gathered once, and its gradient, a sum over chunks, scattered in float32. Of
    # the embedding only the rows looked up are exchanged, and their gradients.
    through_fsdp = 3 * blocks * width + table * (width + FLOAT32) + 2 * stream
    # Each block sums its stream over the tensor axis twice forward, twice backward.
    exchanges = config.model.num_layers * 2 * _passes(config)
    summed = exchanges * 2 * (tensor - 1) / tensor * stream
    reduced = 2 * (data - 1) / data * weights / fsdp * FLOAT32  # once a step
    return microbatches * ((fsdp - 1) / fsdp * through_fsdp + summed) + reduced


def _tables(model: ModelConfig) -> int:
    """How many matrices have a row for each word: the embedding and, unless tied, the output."""
    return 1 if model.tied_embeddings else 2
