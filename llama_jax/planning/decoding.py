"""The plan of a sampler: what weights and cache take, and what the compiled decoding loop does.

Weights lie as in the engine, cut over all devices by the tensor axis. Does not plan the reading of
prompts, which goes a stretch at a time and needs little more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import COMPUTE_DTYPES, MeshConfig, ModelConfig, require
from llama_jax.distributed.mesh import partition_spec, placed, shardings
from llama_jax.inference.decode import NOTHING, GenerationState, decode
from llama_jax.inference.prefill import slots_for
from llama_jax.inference.sampler import make_sampler
from llama_jax.kernels.splash import LANES
from llama_jax.model.cache import KVCache
from llama_jax.model.parameters import abstract
from llama_jax.model.transformer import Llama
from llama_jax.model.unstacked import unstack
from llama_jax.planning.compile import Compiled, compiled, target_mesh
from llama_jax.planning.memory import FLOAT32, bytes_on_one, model_share, planned_mesh
from llama_jax.planning.speed import Speed
from llama_jax.planning.targets import Target
from llama_jax.quantization import abstract_quantized, require_kind

LOGITS = 4  # arrays like the float32 logits that choosing a token has at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model is to be sampled from."""

    batch: int = 1  # texts at once
    context: int = 0  # tokens of prompt and completion; 0: the model's
    quantize: str = ""  # "int8", "int4" or ""
    cache_dtype: str = ""  # "int8" or ""
    dtype: str = ""  # of weights and arithmetic; "": the model's compute dtype


@dataclasses.dataclass(frozen=True)
class DecodingPlan:
    """What is known of sampling on a target; bytes are those of one device."""

    model: ModelConfig
    sampling: Sampling
    target: Target
    weights: float
    cache: float
    temporary: float  # estimated
    compiled: Compiled | None = None  # None: only estimated

    @property
    def estimated(self) -> float:
        """The estimate of all together."""
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
    def uncut(self) -> list[str]:
        """What the devices do not divide, so that each has all of it."""
        config, devices = self.model, self.target.devices
        sizes = {
            "heads": config.num_heads,
            "kv heads": config.num_kv_heads,
            "feed-forward columns": config.ffn_dim,
            "words": config.vocab_size,
        }
        return [f"{size} {name}" for name, size in sizes.items() if size % devices]

    @property
    def speed(self) -> Speed:
        """The prediction for one token of each text: all weights and the whole cache are read."""
        chip, config, devices = self.target.chip, self.model, self.target.devices
        share = model_share(config, devices)
        matrices = share.vocab_size * share.dim + share.num_layers * share.dim * (
            2 * (share.num_heads + share.num_kv_heads) * share.head_dim + 3 * share.ffn_dim
        )
        heads = share.num_layers * share.num_heads
        looked_at = 2 * heads * share.head_dim * share.context_length
        flops = 2 * self.sampling.batch * (matrices + looked_at)
        stream = self.sampling.batch * config.dim * jnp.dtype(config.compute_dtype).itemsize
        # Attention and feed-forward each add up their parts of the stream, if they have any.
        sums = (share.num_heads < config.num_heads) + (share.ffn_dim < config.ffn_dim)
        sent = sums * config.num_layers * 2 * (devices - 1) / devices * stream
        return Speed(
            arithmetic=flops / chip.flops,
            memory=(self.weights + self.cache) / chip.bandwidth,
            network=sent / (chip.link / 2),
        )


def plan_decoding(
    config: ModelConfig, sampling: Sampling, target: Target, *, compile_it: bool
) -> DecodingPlan:
    """The plan of sampling from a model on a target.

    Raises:
      UsageError: for a context, batch or kind of integers that cannot be.
      UserError: when the TPU compiler is needed and missing.
    """
    config = _served(config, sampling)
    mesh = planned_mesh(MeshConfig(data=1, tensor=-1), target.devices)
    model, state = abstract_engine(config, sampling, mesh)
    cache, logits = _bytes(state.cache), sampling.batch * config.vocab_size * FLOAT32
    plan = DecodingPlan(
        model=config,
        sampling=sampling,
        target=target,
        weights=_bytes(model),
        cache=cache,
        temporary=LOGITS * logits + (_padded_copy(cache, config) if target.chip.is_tpu else 0),
    )
    made = _compiled(plan) if compile_it and target.chip.is_tpu else None
    return dataclasses.replace(plan, compiled=made)


def _padded_copy(cache: float, config: ModelConfig) -> float:
    """What a TPU takes to have heads narrower than its lanes side by side, filled up to them."""
    padded = -config.head_dim % LANES
    return cache * (config.head_dim + padded) / config.head_dim if padded else 0.0


def _served(config: ModelConfig, sampling: Sampling) -> ModelConfig:
    """The model with the context and the dtype that are asked for."""
    context, dtype = sampling.context or config.context_length, sampling.dtype
    require(sampling.batch >= 1, f"batch={sampling.batch} is out of range; expected 1 or more")
    require(
        2 <= context <= config.context_length,
        f"context={context} is out of range; expected 2 to {config.context_length}, the model's"
        " context",
    )
    require(
        dtype in ("", *COMPUTE_DTYPES),
        f"dtype={dtype!r} is unknown; expected one of {', '.join(map(repr, COMPUTE_DTYPES))}",
    )
    message = f"cache_dtype={sampling.cache_dtype!r} is unknown; expected 'int8' or ''"
    require(sampling.cache_dtype in ("", "int8"), message)
    if sampling.quantize:
        require_kind(sampling.quantize)
    dtype = dtype or config.compute_dtype
    return dataclasses.replace(config, context_length=context, compute_dtype=dtype)


def abstract_engine(
    config: ModelConfig, sampling: Sampling, mesh: Mesh | AbstractMesh
) -> tuple[Llama, GenerationState]:
    """The model as decoding holds it and the state of a batch, shapes with their shardings."""
    dtype = jnp.dtype(config.compute_dtype)

    def cast(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if is_float else leaf.dtype)

    if sampling.quantize:
        model = abstract_quantized(config, sampling.quantize)
    else:
        model = jax.tree.map(cast, jax.eval_shape(unstack, abstract(config)))
    state = jax.eval_shape(lambda: _state(config, sampling))
    return placed(model, shardings(model, mesh)), placed(state, _state_places(state, mesh))


def _state(config: ModelConfig, sampling: Sampling) -> GenerationState:
    """A batch before its first token."""
    slots = slots_for(config.context_length)
    cache = KVCache.empty(config, sampling.batch, slots, sampling.cache_dtype)
    count_B = jnp.zeros(sampling.batch, jnp.int32)
    keys_B = jax.vmap(jax.random.key)(count_B)
    return GenerationState(cache, count_B, count_B > 0, count_B, keys_B, None)


def _state_places(state: GenerationState, mesh: Mesh | AbstractMesh) -> GenerationState:
    """As the engine cuts them: of the cache each device has its own kv heads."""

    def place(leaf: Any) -> NamedSharding:
        if leaf.ndim < 3:
            return NamedSharding(mesh, PartitionSpec())
        axes = ("kv_heads", "length", "head_dim")
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))

    return jax.tree.map(place, state)


def _bytes(tree: Any) -> int:
    """Bytes of placed shapes on one device."""
    return bytes_on_one(tree, jax.tree.map(lambda leaf: leaf.sharding, tree), is_tpu=False)


def _compiled(plan: DecodingPlan) -> Compiled:
    """What the TPU compiler makes of the decoding loop."""
    mesh = target_mesh(MeshConfig(data=1, tensor=-1), plan.target)
    with jax.set_mesh(mesh):
        model, state = abstract_engine(plan.model, plan.sampling, mesh)
        sampler, stops_S = make_sampler(temperature=1.0, top_p=0.9), np.asarray([NOTHING], np.int32)
        return compiled(lambda: decode.lower(model, state, sampler, stops_S), plan.estimated)
