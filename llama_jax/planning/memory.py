"""How a TPU lays an array out in its memory: in tiles of 8 × 128 numbers, filled up where need be.

Does not know which arrays there are.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from llama_jax.distributed.fitting import require_fitting
from llama_jax.distributed.mesh import MESH_AXES, batch_shards, mesh_shape
from llama_jax.hardware.accelerators import Chip
from llama_jax.kernels.attention import choose_kernel
from llama_jax.kernels.splash import LANES, block_length
from llama_jax.planning.activations import Pass, kept_bytes
from llama_jax.training.loss import CHUNK_TOKENS
from llama_jax.training.step import abstract_state, state_shardings

SUBLANES = 8  # rows of a tile; of an axis of 1, 2 or 4, as many as that


def filled_up(shape: tuple[int, ...]) -> int:
    """How many numbers an array takes, laid out as the compiler would: with the least filling."""
    if len(shape) < 2:
        return _up(math.prod(shape), LANES)
    return min(
        math.prod(shape) // (rows * columns) * _up(columns, LANES) * _up(rows, _tile_rows(rows))
        for rows, columns in itertools.permutations(shape, 2)
    )


def filled_rows(shape: tuple[int, int]) -> int:
    """The same for a matrix that has to lie row by row, because rows are looked up in it."""
    rows, columns = shape
    return _up(rows, _tile_rows(rows)) * _up(columns, LANES)


def _tile_rows(rows: int) -> int:
    return next(tile for tile in (1, 2, 4, SUBLANES) if rows <= tile or tile == SUBLANES)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


# One device's share of a training step: its rows, its heads, its part of each parameter.
#
# Sizes only, from the descriptions that sharding itself goes by. Does not know memory or time.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShare(ModelConfig):
    """A model as one device of the tensor axis sees it: whole width, some heads and columns."""

    whole_head_dim: int

    @property
    def head_dim(self) -> int:
        """Width of one head: cutting heads does not change it."""
        return self.whole_head_dim


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """As much of a `jax.Device` as choosing an attention kernel asks about."""

    platform: str
    device_kind: str
    compute_capability: str = ""


def planned_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of a config on devices that are not here.

    Raises:
      UsageError: when its sizes do not multiply to the number of devices.
    """
    return AbstractMesh(
        mesh_shape(config, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def require_rows(config: Config, mesh: AbstractMesh) -> int:
    """The rows of a microbatch on one device.

    Raises:
      UsageError: when the run cannot be cut over the mesh.
    """
    require_fitting(config, mesh.shape)
    return config.microbatch_size // batch_shards(mesh)


def model_share(config: ModelConfig, tensor: int) -> ModelShare:
    """What one of `tensor` devices computes of a model; what they do not divide stays whole."""

    def part(size: int) -> int:
        return size if size % tensor else size // tensor

    heads = part(config.num_heads)
    kv_heads = config.num_kv_heads // math.gcd(config.num_kv_heads, tensor)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    fields |= {
        "num_heads": heads,
        "num_kv_heads": kv_heads if heads < config.num_heads else config.num_kv_heads,
        "hidden_dim": part(config.ffn_dim),
        "vocab_size": part(config.vocab_size),
    }
    return ModelShare(**fields, whole_head_dim=config.head_dim)


def attention_backend(config: Config, chip: Chip) -> str:
    """The attention kernel that a run would choose on a chip."""
    platform = "tpu" if chip.is_tpu else "gpu"
    device = PlannedDevice(platform, chip.kinds[0], chip.capability)
    dropout = config.model.dropout
    return choose_kernel(
        config.run.attention,
        device,  # type: ignore[arg-type]
        head_dim=config.model.head_dim,
        dtype=config.model.compute_dtype,
        dropout=dropout,
    )


def bytes_on_one(tree: Any, places: Any, *, is_tpu: bool) -> int:
    """Bytes that one device takes for a tree of shaped leaves with a sharding each."""
    numbers = filled_up if is_tpu else math.prod
    sizes = jax.tree.map(
        lambda leaf, place: numbers(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        places,
    )
    return sum(jax.tree.leaves(sizes))


# How many bytes a training step takes on one device, without compiling it.
#
# A sum of parts, each with the reason it exists. What the state takes follows from its
# descriptions,
# what is kept for the backward pass from the traced model, and the rest from the order in which XLA
# runs a step. Does not know what a device offers.

FLOAT32 = 4
# With mesh.sequence, whole streams that are in memory at the fullest moment: a block's gathered
# input and gradient, and products not yet summed over the tensor axis and cut. By the compiler's
# figures, where there is room; and where there is none, since it then gathers some again.
WHOLE_STREAMS = 3.8
FEWEST_STREAMS = 2.35


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind."""

    parameters: float
    optimizer: float  # both moments
    activations: float  # kept from the forward pass for the backward pass
    temporary: float  # gradients, parameters in the compute dtype, what is short-lived

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.parameters + self.optimizer + self.activations + self.temporary


def training_memory(config: Config, mesh: AbstractMesh, chip: Chip) -> Memory:
    """The estimate for one device of a mesh.

    Raises:
      UsageError: when a microbatch does not divide over the mesh, or attention cannot run there.
    """
    rows = require_rows(config, mesh)
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=1)  # makes no difference
    parameters, moments = state_bytes(config.model, optimizer, mesh, is_tpu=chip.is_tpu)
    share = model_share(config.model, mesh.shape["tensor"])
    forward = Pass(
        length=config.data.sequence_length,
        remat=config.run.remat,
        backend=attention_backend(config, chip),
        is_tpu=chip.is_tpu,
        packed=config.data.packing != "none",
        stream_parts=mesh.shape["tensor"] if config.mesh.sequence else 1,
        fsdp=mesh.shape["fsdp"],
    )
    has_sums = config.optimizer.accumulation_steps > 1
    backward = parameters + _block_bytes(share, rows, forward) + _gathered_bytes(share, forward)
    loss = _loss_bytes(share, rows, forward)
    kept = kept_bytes(share, rows, forward)
    temporary = _lasting_bytes(share, parameters, forward, has_sums) + max(backward, loss)
    room = chip.usable - parameters - moments - kept - temporary
    return Memory(
        parameters=parameters,
        optimizer=moments,
        activations=kept,
        temporary=temporary + _gathered_streams(share, rows, forward, room),
    )


@functools.cache
def state_bytes(
    model: ModelConfig, optimizer: OptimizerConfig, mesh: AbstractMesh, *, is_tpu: bool
) -> tuple[int, int]:
    """What the parameters and the optimizer's state take on one device."""
    # Both depend on nothing else; data just has to be something.
    data = DataConfig(path="none", batch_size=1, sequence_length=2)
    config = Config(model=model, data=data, optimizer=optimizer)
    state = abstract_state(config)
    places = state_shardings(config, mesh)  # type: ignore[arg-type]
    of_model = bytes_on_one(state.model, places.model, is_tpu=is_tpu)
    return of_model, bytes_on_one(state.optimizer, places.optimizer, is_tpu=is_tpu)


def _lasting_bytes(share: ModelConfig, parameters: float, forward: Pass, has_sums: bool) -> float:
    """What stays for the whole step: sums of gradients, and parameters in the compute dtype.

    XLA converts the parameters once, before the loop over microbatches. Of the embedding it wants
    whole rows in both, since tokens look them up: few columns a device fill a TPU's tiles badly.
    """
    width = jnp.dtype(share.compute_dtype).itemsize
    each = FLOAT32 * has_sums + width * (width < FLOAT32)  # bytes a parameter
    lasting = parameters / FLOAT32 * each
    if forward.is_tpu:
        table = share.vocab_size, share.dim // forward.fsdp
        lasting += each * (filled_rows(table) - filled_up(table))
    return lasting


def _block_bytes(share: ModelConfig, rows: int, forward: Pass) -> float:
    """What is alive within the backward pass of one block, beside all gradients.

    Three arrays as wide as the feed-forward (gate, up, and the gradient of one), or what attention
    holds, if that is more: all scores and their gradient, or for splash the inputs, the output and
    their gradients, filled up to whole blocks of positions and lanes.
    """
    T, N, width = forward.length, share.num_heads, jnp.dtype(share.compute_dtype).itemsize
    attention = 0
    if forward.backend == "xla":
        attention = 2 * rows * N * T * T * FLOAT32
    elif forward.backend == "splash":
        positions = -(-T // block_length(T)) * block_length(T)
        attention = 8 * rows * N * filled_rows((positions, share.head_dim)) * width
    return max(3 * rows * T * share.ffn_dim * width, attention)


def _gathered_streams(share: ModelConfig, rows: int, forward: Pass, room: float) -> float:
    """What streams cut along the sequence take where they are whole, given so much room."""
    if forward.stream_parts == 1:
        return 0.0
    width = jnp.dtype(share.compute_dtype).itemsize
    stream = rows * forward.length * share.dim * width
    return min(WHOLE_STREAMS * stream, max(room, FEWEST_STREAMS * stream))


def _gathered_bytes(share: ModelConfig, forward: Pass) -> float:
    """What fsdp puts together for a block: its matrices, their gradients, and the next one's."""
    if forward.fsdp == 1:
        return 0.0
    D, heads = share.dim, share.num_heads + share.num_kv_heads
    matrices = 2 * D * heads * share.head_dim + 3 * D * share.ffn_dim
    return 3 * matrices * jnp.dtype(share.compute_dtype).itemsize


def _loss_bytes(share: ModelConfig, rows: int, forward: Pass) -> float:
    """What is alive within the loss, before there are gradients.

    The logits of one chunk and their gradient; with fsdp, the output matrix put together, too, and
    over several chunks its gradient.
    """
    tokens, width = rows * forward.length, jnp.dtype(share.compute_dtype).itemsize
    logits = min(CHUNK_TOKENS, tokens) * share.vocab_size * (FLOAT32 + width)
    table = share.vocab_size * share.dim if forward.fsdp > 1 else 0
    return logits + table * (width + FLOAT32 * (tokens > CHUNK_TOKENS))
