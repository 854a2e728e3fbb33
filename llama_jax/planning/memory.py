"""How many bytes a training step takes on one device, estimated without compiling it.

A sum of parts, each with its reason. Parameters and moments follow from the shapes and shardings of
the train state, residuals from the traced model, and the rest from the order in which XLA runs a
step. On TPU, arrays are padded to tiles of 8 × 128 elements.
"""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from llama_jax.config import Config, MeshConfig, ModelConfig
from llama_jax.distributed.mesh import MESH_AXES, batch_shards, mesh_shape, require_fitting
from llama_jax.hardware.accelerators import Chip, adds_along_all_axes
from llama_jax.kernels.attention import choose_kernel
from llama_jax.kernels.splash import LANES, block_length
from llama_jax.model.execution import choose_remat
from llama_jax.model.parameters import block_parameters, table_parameters
from llama_jax.planning.activations import DeviceStep, residual_bytes, state_config
from llama_jax.training.loss import CHUNK_TOKENS
from llama_jax.training.step import abstract_state, state_shardings

SUBLANES = 8  # rows of a TPU's tile; for arrays of 1, 2 or 4 rows as many as that
FLOAT32 = 4  # bytes
# With mesh.sequence, copies of the residual stream that are gathered at the peak: a block's input
# and gradient, and matmul outputs not yet reduced over the tensor axis. Fitted to the compiler's
# figures: with room, and without, where it then gathers some of them again.
GATHERED_STREAMS = 3.8
MIN_GATHERED_STREAMS = 2.35
# Copies of the integers of frozen matrices on TPU, in the layouts that forward and backward matmuls
# read: two of some matrices at the peak. Fitted to the compiler's figure.
COPIES_OF_INTEGERS = 1.5


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind."""

    parameters: float
    optimizer: float  # both moments
    activations: float  # residuals: kept from the forward pass for the backward pass
    temporary: float  # gradients, parameters in the compute dtype, short-lived arrays

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.parameters + self.optimizer + self.activations + self.temporary


def training_memory(
    config: Config, mesh: AbstractMesh, chip: Chip, correction: float = 1.0
) -> Memory:
    """Return the estimate for one device of a mesh.

    Args:
      correction: bytes that the compiler uses for each estimated byte; the less memory is left,
        the fewer arrays does it keep gathered.

    Raises:
      UsageError: when a microbatch does not divide over the mesh, or the attention kernel cannot
        run on the chip.
    """
    bare = state_config(config)
    trainable, frozen, moments = state_bytes(bare, mesh, is_tpu=chip.is_tpu)
    parameters = trainable + frozen
    step = DeviceStep(
        model=model_shard(config.model, mesh.shape["tensor"]),
        lora=config.lora,
        batch=sequences_per_device(config, mesh),
        length=config.data.sequence_length,
        remat=remat_policy(config, chip),
        attention=attention_backend(config, chip),
        is_tpu=chip.is_tpu,
        packed=config.data.packing != "none",
        sequence_shards=mesh.shape["tensor"] if config.mesh.sequence else 1,
        fsdp=mesh.shape["fsdp"],
    )
    accumulates = config.optimizer.accumulation_steps > 1
    residuals = residual_bytes(step)
    backward = trainable + _block_bytes(step)
    if step.fsdp > 1:  # gathered at once: a block's matrices, their gradients, the next block's
        backward += 3 * block_parameters(step.model) * step.width
    temporary = _lasting_bytes(step, trainable, accumulates) + max(backward, _loss_bytes(step))
    if accumulates and step.fsdp == mesh.size and adds_along_all_axes(chip, mesh.size):
        temporary += _unsharded_sum_bytes(step)
    if chip.is_tpu:
        temporary += COPIES_OF_INTEGERS * _integer_bytes(bare, mesh)
    if step.sequence_shards > 1:
        room = chip.usable / correction - parameters - moments - residuals - temporary
        least, most = MIN_GATHERED_STREAMS * step.stream, GATHERED_STREAMS * step.stream
        temporary += min(most, max(room, least))
    return Memory(parameters, moments, residuals, temporary)


@functools.cache
def state_bytes(config: Config, mesh: AbstractMesh, *, is_tpu: bool) -> tuple[int, int, int]:
    """Return the bytes on one device of what is trained, what is frozen, and the optimizer state.

    Cached: `config` should be a `state_config`.
    """
    state = abstract_state(config)
    places = state_shardings(config, mesh)  # type: ignore[arg-type]
    trainable, frozen, moments = (
        device_bytes(getattr(state, part), getattr(places, part), is_tpu=is_tpu)
        for part in ("trainable", "frozen", "optimizer")
    )
    return trainable, frozen, moments


@functools.cache
def _integer_bytes(config: Config, mesh: AbstractMesh) -> int:
    """Return the bytes on one TPU device of the integers of frozen matrices."""
    state, places = abstract_state(config), state_shardings(config, mesh)  # type: ignore[arg-type]
    pairs = zip(jax.tree.leaves(state.frozen), jax.tree.leaves(places.frozen))
    integers = [pair for pair in pairs if pair[0].dtype.itemsize == 1]
    return sum(device_bytes(*pair, is_tpu=True) for pair in integers)


def _lasting_bytes(step: DeviceStep, trainable: float, accumulates: bool) -> float:
    """Return what lives during the whole step: gradient sums, parameters in the compute dtype.

    XLA converts the trained parameters once, before the loop over microbatches. Both copies of the
    embedding are row-major, since tokens look rows up: few columns per device fill a TPU's tiles
    badly.
    """
    # Per parameter.
    each = FLOAT32 * accumulates + step.width * (step.width < FLOAT32)
    lasting = trainable / FLOAT32 * each
    if step.is_tpu and not step.lora.rank:
        table = step.model.vocab_size, step.model.dim // step.fsdp
        lasting += each * (padded_row_major_size(table) - padded_size(table))
    return lasting


def _unsharded_sum_bytes(step: DeviceStep) -> float:
    """Return what XLA adds up in place of a shard, to all-reduce it once and not per microbatch.

    That is the gradient of the output matrix, where only the loss has one.
    """
    is_alone = not step.model.tied_embeddings and not step.lora.rank
    return table_parameters(step.model) * FLOAT32 if is_alone else 0


def _block_bytes(step: DeviceStep) -> float:
    """Return what the backward pass of one block needs at once, beside all gradients.

    The larger of the feed-forward's and attention's: three arrays of the feed-forward's width
    (gate, up, the gradient of one); or all scores and their gradient, for splash the inputs, the
    output and their gradients, padded to whole blocks of positions and lanes.
    """
    B, T, N, attention = step.batch, step.length, step.model.num_heads, 0
    if step.attention == "xla":
        attention = 2 * B * N * T * T * FLOAT32
    elif step.attention == "splash":
        positions = _round_up(T, block_length(T))
        padded = padded_row_major_size((positions, step.model.head_size))
        attention = 4 * B * (N + step.model.num_kv_heads) * padded * step.width
    return max(3 * B * T * step.model.ffn_dim * step.width, attention)


def _loss_bytes(step: DeviceStep) -> float:
    """Return what the loss needs at once, before there are gradients.

    The logits of one chunk and their gradient; with fsdp the gathered output matrix too, and over
    several chunks its gradient.
    """
    tokens = step.batch * step.length
    logits = min(CHUNK_TOKENS, tokens) * step.model.vocab_size * (FLOAT32 + step.width)
    table = table_parameters(step.model) if step.fsdp > 1 else 0
    return logits + table * (step.width + FLOAT32 * (tokens > CHUNK_TOKENS))


# One device's shard of a training step.


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """Return the mesh of a config on `devices` devices that need not exist.

    Raises:
      UsageError: when its sizes do not multiply to the number of devices.
    """
    return AbstractMesh(
        mesh_shape(config, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def sequences_per_device(config: Config, mesh: AbstractMesh) -> int:
    """Return how many sequences of a microbatch one device has.

    Raises:
      UsageError: when the run does not divide over the mesh.
    """
    require_fitting(config, mesh.shape)
    return config.microbatch_size // batch_shards(mesh)


def model_shard(config: ModelConfig, tensor: int) -> ModelConfig:
    """Return what one of `tensor` devices computes; sizes that they do not divide stay."""

    def divided(size: int) -> int:
        return size if size % tensor else size // tensor

    heads, kv_heads = divided(config.num_heads), config.num_kv_heads
    if heads < config.num_heads:
        kv_heads //= math.gcd(kv_heads, tensor)
    return dataclasses.replace(
        config,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.head_size,
        hidden_dim=divided(config.ffn_dim),
        vocab_size=divided(config.vocab_size),
    )


def attention_backend(config: Config, chip: Chip) -> str:
    """Return the attention kernel that a run would choose on a chip."""
    device: Any = SimpleNamespace(  # the attributes of a `jax.Device` that the choice depends on
        platform="tpu" if chip.is_tpu else "gpu",
        device_kind=chip.kinds[0],
        compute_capability=chip.capability,
    )
    return choose_kernel(
        config.run.attention,
        device,
        head_dim=config.model.head_size,
        dtype=config.model.compute_dtype,
        dropout=config.model.dropout,
        position=config.model.position,
    )


def remat_policy(config: Config, chip: Chip) -> str:
    """Return the rematerialisation policy that a run would choose on a chip."""
    return choose_remat(config.run.remat, "tpu" if chip.is_tpu else "gpu")


def device_bytes(tree: Any, shardings: Any, *, is_tpu: bool) -> int:
    """Return the bytes on one device of a pytree of shapes with a sharding each."""
    elements = padded_size if is_tpu else math.prod
    sizes = jax.tree.map(
        lambda leaf, place: elements(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def padded_size(shape: tuple[int, ...]) -> int:
    """Return how many elements a TPU stores for an array, in the layout with the least padding."""
    if len(shape) < 2:
        return _round_up(math.prod(shape), LANES)
    return min(
        math.prod(shape)
        // (rows * columns)
        * _round_up(columns, LANES)
        * _round_up(rows, _tile_rows(rows))
        for rows, columns in itertools.permutations(shape, 2)
    )


def padded_row_major_size(shape: tuple[int, int]) -> int:
    """Return how many elements a TPU stores for a matrix that has to be row-major."""
    rows, columns = shape
    return _round_up(rows, _tile_rows(rows)) * _round_up(columns, LANES)


def _tile_rows(rows: int) -> int:
    return next(tile for tile in (1, 2, 4, SUBLANES) if rows <= tile or tile == SUBLANES)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
