"""The plan of decoding: what weights and KV cache take, and what the compiled decode loop does.

Weights are sharded as in the engine, over all devices by the tensor axis. Prefill, which processes
a chunk at a time and needs little more, is not planned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from llama_jax.config import COMPUTE_DTYPES, MAX_INT, Choice, MeshConfig, ModelConfig, Range
from llama_jax.distributed.mesh import placed, shardings
from llama_jax.errors import require
from llama_jax.inference.decode import (
    NO_TOKEN,
    GenerationState,
    cache_config,
    cache_slots,
    decode,
    decoding_execution,
    state_shardings,
)
from llama_jax.inference.request import SamplingParams
from llama_jax.inference.sampler import Sampler
from llama_jax.kernels.int4_tpu import MOST_ROWS
from llama_jax.kernels.matmul import BYTE_ROWS, FEW
from llama_jax.kernels.splash import LANES
from llama_jax.model.cache import KVCache
from llama_jax.model.parameters import abstract, matmul_parameters
from llama_jax.model.transformer import Llama, unstack
from llama_jax.planning.compile import Compiled, compile_program, target_mesh
from llama_jax.planning.memory import (
    FLOAT32,
    abstract_mesh,
    device_bytes,
    model_shard,
    padded_row_major_size,
    padded_size,
)
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target
from llama_jax.quantization import KINDS, QuantizedMatrix, abstract_quantized, shard_matmuls

LOGITS_COPIES = 4  # arrays of the size of the float32 logits that sampling a token needs at once
MESH = MeshConfig(data=1, tensor=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How a model is decoded."""

    batch: int = 1  # sequences decoded together
    context: int = 0  # tokens of prompt and completion; 0: the model's
    quantize: str = ""  # of `quantization.KINDS`, or ""
    cache_dtype: str = ""  # "int8", or "" for the model's compute dtype
    dtype: str = ""  # of weights and arithmetic; "": the model's compute dtype


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """What is known about decoding on a target; bytes are those of one device."""

    model: ModelConfig
    options: DecodingOptions
    target: Target
    weights: float
    cache: float
    temporary: float  # estimated
    compiled: Compiled | None = None  # None: only estimated

    @property
    def estimated(self) -> float:
        """The estimated sum."""
        return self.weights + self.cache + self.temporary

    @property
    def total(self) -> float:
        """Bytes on one device: the compiler's figure where there is one."""
        return self.compiled.total if self.compiled else self.estimated

    @property
    def fits(self) -> bool:
        """Whether one device holds them."""
        return self.total <= self.target.chip.usable and (not self.compiled or self.compiled.fits)

    @property
    def replicated(self) -> list[str]:
        """What the number of devices does not divide, so that each device has all of it."""
        config, devices = self.model, self.target.devices
        sizes = {
            "heads": config.num_heads,
            "kv heads": config.num_kv_heads,
            "feed-forward columns": config.ffn_dim,
            "tokens of the vocabulary": config.vocab_size,
        }
        return [f"{size} {name}" for name, size in sizes.items() if size % devices]

    @property
    def speed(self) -> Speed:
        """The prediction for one token of each sequence: all weights and the cache are read."""
        chip, config, devices = self.target.chip, self.model, self.target.devices
        shard, batch = model_shard(config, devices), self.options.batch
        heads = shard.num_layers * shard.num_heads
        attention = 2 * heads * shard.head_size * shard.context_length
        flops = 2 * batch * (matmul_parameters(shard) + attention)
        stream = batch * config.dim * jnp.dtype(config.compute_dtype).itemsize
        # Attention and feed-forward each all-reduce the stream if they are sharded.
        sums = (shard.num_heads < config.num_heads) + (shard.ffn_dim < config.ffn_dim)
        sent = sums * config.num_layers * 2 * (devices - 1) / devices * stream
        return Speed(
            arithmetic=flops / chip.flops,
            memory=(self.weights + self.cache) / chip.bandwidth,
            network=sent / (chip.link / 2),
        )


def plan_decoding(
    config: ModelConfig,
    options: DecodingOptions,
    target: Target,
    compiler: Callable[[DecodingPlan], Compiled] | None = None,
) -> DecodingPlan:
    """Return the plan of decoding with a model on a target.

    Args:
      compiler: such as `compile_decoding`, for TPUs; None: estimate only.

    Raises:
      UsageError: for an option that is out of range or unknown.
    """
    table = config.context_length if config.position == "absolute" else 1  # rows in the weights
    config, mesh = _with_options(config, options), abstract_mesh(MESH, target.devices)
    cache = abstract_state(config, options, mesh).cache
    any_context = dataclasses.replace(config, context_length=table)
    weights = _weights(any_context, options.quantize, mesh)
    temporary: float = LOGITS_COPIES * options.batch * config.vocab_size * FLOAT32
    if target.chip.is_tpu:
        few = options.batch <= MOST_ROWS
        temporary += _padded_cache(cache) if options.batch > 1 else 0
        by_kernel: list[QuantizedMatrix] = []
        by_xla: list[QuantizedMatrix] = []
        for matrix in _four_bit_matrices(weights):
            (by_kernel if few and matrix.shards else by_xla).append(matrix)
        if all(matrix is not weights.embedding for matrix in by_kernel):  # else it is among those
            temporary += _embedding_by_rows(weights, few and options.quantize == "int8")
        by_rows = _scales_by_rows(by_kernel)
        temporary += max(by_rows, _broadcast_scales(by_xla, config, options.batch))
    plan = DecodingPlan(
        model=config,
        options=options,
        target=target,
        weights=_placed_bytes(weights),
        cache=_placed_bytes(cache),
        temporary=temporary,
    )
    return dataclasses.replace(plan, compiled=compiler(plan)) if compiler else plan


def compile_decoding(plan: DecodingPlan) -> Compiled:
    """Compile the decode loop of a plan for its TPU target."""
    mesh = target_mesh(MESH, plan.target)
    with jax.set_mesh(mesh):
        traced = trace_decoding(plan.model, plan.options, mesh)
        return compile_program(traced.lower, plan.estimated)


def trace_decoding(
    config: ModelConfig, options: DecodingOptions, mesh: Mesh | AbstractMesh
) -> jax.stages.Traced:
    """Return the traced decode loop for the devices of a mesh, which is to be set."""
    # As shapes: the mesh that is set may have devices to compile for that cannot run anything.
    sampler = jax.eval_shape(lambda: Sampler.of([SamplingParams()] * options.batch))
    return decode.trace(
        abstract_model(config, options.quantize, mesh),
        abstract_state(config, options, mesh),
        sampler,
        np.asarray([NO_TOKEN], np.int32),
        execution=decoding_execution(),
    )


def _with_options(config: ModelConfig, options: DecodingOptions) -> ModelConfig:
    """Return the model with the context and the dtype of the options, all of which are checked."""
    Range(1, MAX_INT).check("batch", options.batch)
    Choice(("", *KINDS)).check("quantize", options.quantize)
    Choice(("", "int8")).check("cache_dtype", options.cache_dtype)
    Choice(("", *COMPUTE_DTYPES)).check("dtype", options.dtype)
    context = options.context or config.context_length
    require(
        2 <= context <= config.context_length,
        f"context={context} is out of range; expected 2 to {config.context_length}, the model's"
        " context",
    )
    dtype = options.dtype or config.compute_dtype
    return dataclasses.replace(config, context_length=context, compute_dtype=dtype)


def abstract_model(config: ModelConfig, quantize: str, mesh: Mesh | AbstractMesh) -> Llama:
    """Return the model in its layout for decoding, as shapes with the engine's shardings."""
    dtype = jnp.dtype(config.compute_dtype)
    if quantize:
        model = abstract_quantized(config, quantize)
    else:
        model = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype),
            jax.eval_shape(unstack, abstract(config)),
        )
    return shard_matmuls(placed(model, shardings(model, mesh)))


def abstract_state(
    config: ModelConfig, options: DecodingOptions, mesh: Mesh | AbstractMesh
) -> GenerationState:
    """Return the state of a batch in decoding, as shapes with the engine's shardings."""

    def initial() -> GenerationState:
        slots = cache_slots(config.context_length)
        own = cache_config(config, mesh)
        cache = KVCache.empty(own, options.batch, slots, options.cache_dtype)
        count_B = jnp.zeros(options.batch, jnp.int32)
        keys_B = jax.vmap(jax.random.key)(count_B)
        return GenerationState(cache, count_B, count_B > 0, count_B, keys_B, None)

    state = jax.eval_shape(initial)
    return placed(state, state_shardings(state, mesh))


_weights = functools.cache(abstract_model)


# ---- what the TPU compiler holds beside weights and cache ----


def _padded_cache(cache: KVCache) -> float:
    """Return the bytes of the copy of a batch's cache that attention reads, heads padded to tiles.

    Heads that fill the lanes are read where they are, and so is the cache of one sequence.
    """
    R, _, H = _shard_shape(jax.tree.leaves(cache.layers)[0])
    return _placed_bytes(cache) * padded_row_major_size((R, H)) / (R * H) if H % LANES else 0


def _embedding_by_rows(model: Llama, by_tiles: bool) -> int:
    """Return the bytes of the copy of the embedding in which tokens are looked up, row by row.

    Floats are stored so already unless that pads them more.

    Args:
      by_tiles: whether whole tiles of bytes are looked up instead, see `kernels.matmul.take_rows`.
        Beside the calls of `kernels.int4_tpu`, XLA makes the copy all the same.
    """
    table = model.embedding
    is_quantized = isinstance(table, QuantizedMatrix)
    kernel = jax.tree.leaves(table.kernel if is_quantized else table)[0]
    V, D = _shard_shape(kernel)
    padded = padded_row_major_size((V, D))
    by_tiles = by_tiles and V % BYTE_ROWS == 0 and D % LANES == 0
    is_copied = not by_tiles if is_quantized else padded > padded_size((V, D))
    return padded * kernel.dtype.itemsize if is_copied else 0


def _scales_by_rows(matrices: list[QuantizedMatrix]) -> int:
    """Return the bytes of what `kernels.int4_tpu` reads of the largest int4 matrix, by rows.

    Groups of inputs are few, and padded to the lanes: the scales twice, the minima, their sum.
    """
    each_scale = 3 * jnp.dtype(jnp.bfloat16).itemsize + FLOAT32
    sizes = []
    for matrix in matrices:
        arrays = (matrix.kernel, matrix.scale)
        (*O, P), (*_, G) = (_shard_shape(*jax.tree.leaves(array)) for array in arrays)
        rows, inputs, groups = math.prod(O), int(P), int(G)
        by_rows = padded_row_major_size((rows, groups))
        sizes.append(padded_row_major_size((rows, inputs)) + each_scale * by_rows)
    return max(sizes, default=0)


def _broadcast_scales(matrices: list[QuantizedMatrix], config: ModelConfig, batch: int) -> int:
    """Return the bytes of floats that XLA makes of the largest of four-bit matrices.

    It broadcasts the scales and the minima of the low and of the high bits to one number for each
    byte; for few sequences in float32, and for more than one of them it stores both halves of the
    matrix too.
    """
    sizes = [math.prod(_shard_shape(*jax.tree.leaves(matrix.kernel))) for matrix in matrices]
    largest = max(sizes, default=0)
    if batch > FEW:
        return 4 * largest * jnp.dtype(config.compute_dtype).itemsize
    return (4 if batch == 1 else 6) * largest * FLOAT32


def _four_bit_matrices(model: Llama) -> list[QuantizedMatrix]:
    def is_one(part: Any) -> bool:
        return isinstance(part, QuantizedMatrix) and part.is_four_bits

    return list(filter(is_one, jax.tree.leaves(model, is_leaf=is_one)))


def _shard_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Return the shape on one device of a shape with a sharding."""
    assert leaf.sharding is not None
    return leaf.sharding.shard_shape(leaf.shape)


def _placed_bytes(tree: Any) -> int:
    """Return the bytes on one device of shapes with shardings."""
    return device_bytes(tree, jax.tree.map(lambda leaf: leaf.sharding, tree), is_tpu=False)
