"""What a forward pass keeps on one device for the backward pass, read off the traced program.

The model itself is traced with the sizes of one device's shard, and JAX reports the residuals: a
change of the model or of its rematerialisation shows here by itself. Nothing is computed.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llama_jax.config import ModelConfig
from llama_jax.distributed.fsdp import example_ids, gather, lookup
from llama_jax.distributed.mesh import MESH_AXES, constrain, shardings
from llama_jax.kernels.attention import xla_attention
from llama_jax.kernels.splash import LANES
from llama_jax.model.execution import Execution
from llama_jax.model.parameters import abstract
from llama_jax.training.loss import summed_nll
from llama_jax.training.step import UNROLLED_ON_CPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceStep:
    """One device's shard of a train step."""

    model: ModelConfig  # what the device computes, see `planning.memory.model_shard`
    batch: int  # sequences of a microbatch on the device
    length: int  # tokens of a sequence
    remat: str
    attention: str  # the kernel
    is_tpu: bool
    packed: bool = False  # with several documents per sequence
    sequence_shards: int = 1  # shards of the residual stream between blocks
    fsdp: int = 1  # shards of the parameters

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.model.compute_dtype).itemsize

    @property
    def stream(self) -> int:
        """Bytes of the unsharded residual stream."""
        return self.batch * self.length * self.model.dim * self.width


def residual_bytes(step: DeviceStep) -> int:
    """Return the bytes of the residuals of all blocks and of the loss."""

    def traced(batch: int) -> int:
        few = dataclasses.replace(step, batch=batch)
        arrays = _residuals(dataclasses.replace(few, sequence_shards=1))  # of no consequence
        return sum(_bytes(array, copies, few) for array, copies in arrays.items())

    few = min(step.batch, 2)
    first, last = traced(max(1, few - 1)), traced(few)
    return last + (step.batch - few) * (last - first)  # each further one adds as much as the second


@functools.cache
def _residuals(step: DeviceStep) -> Counter[jax.ShapeDtypeStruct]:
    """Return how many arrays of each kind differentiating the loss keeps, parameters aside."""
    config = step.model
    tokens_BT, weights_BT = (
        jax.ShapeDtypeStruct((step.batch, step.length), dtype) for dtype in (jnp.int32, jnp.float32)
    )
    flash = _flash_attention(step.is_tpu, step.fsdp > 1)
    execution = Execution(
        attention=xla_attention if step.attention == "xla" else flash,
        # Offloaded residuals are in the host's memory: the device keeps as much as without them.
        remat="block" if step.remat == "offload" else step.remat,
        unroll=UNROLLED_ON_CPU if step.remat == "none" else 1,
        constrain=constrain,
        gather=gather if step.fsdp > 1 else None,
        lookup=lookup,
        example_ids=example_ids,
    )

    def residuals(model: Any, tokens_BT: jax.Array, weights_BT: jax.Array) -> list[Any]:
        def loss(model: Any) -> jax.Array:
            hidden_BTD, _ = model.hidden(
                tokens_BT,
                segments_BT=tokens_BT if step.packed else None,
                dropout_key=jax.random.key(0) if config.dropout else None,
                execution=execution,
            )
            return summed_nll(hidden_BTD, model.output_VD, tokens_BT, weights_BT)

        return jax.tree.leaves(jax.vjp(loss, model)[1])

    program = _trace(residuals, step, tokens_BT, weights_BT)
    inputs = {id(variable) for variable in program.invars}
    new = {id(v): v.aval for v in program.outvars if id(v) not in inputs and hasattr(v, "aval")}
    kept = Counter(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in new.values())
    if step.remat == "none" and step.fsdp == 1:
        # JAX lists three times more what XLA keeps once: queries, keys and values read one input,
        # gate and up another. With sharded parameters it lists nothing that is only reshaped.
        shape = (config.num_layers, step.batch * step.length, config.dim)
        kept -= Counter({jax.ShapeDtypeStruct(shape, jnp.dtype(config.compute_dtype)): 3})
    return kept


_model = functools.cache(abstract)


def _trace(function: Callable[..., Any], step: DeviceStep, *batch: Any) -> Any:
    """Return the program of a function of a model and its batch on one of `step.fsdp` devices."""
    model = _model(step.model)
    if step.fsdp == 1:
        return jax.make_jaxpr(function)(model, *batch).jaxpr
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1, step.fsdp, 1), MESH_AXES, axis_types=axis_types)
    shards = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        model,
        shardings(model, mesh),
    )
    replicated = PartitionSpec()  # the inputs are one device's shards already
    on_one = jax.shard_map(
        function, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False
    )
    (equation,) = jax.make_jaxpr(on_one)(shards, *batch).jaxpr.eqns
    return equation.params["jaxpr"]


def _bytes(array: jax.ShapeDtypeStruct, copies: int, step: DeviceStep) -> int:
    """Return the bytes that one device keeps of `copies` arrays."""
    B, T, L, D = step.batch, step.length, step.model.num_layers, step.model.dim
    size = math.prod(array.shape) * (getattr(array.dtype, "itemsize", None) or 4)  # a key has 4
    if array.ndim == 5 and array.shape[-2:] == (T, T):
        return 0  # [K, B, G, T, S] without layers: the mask of all blocks, which XLA recomputes
    if array.shape[-2:] == (T, D):
        return copies * size // step.sequence_shards
    if array.shape[-2:] == (B * T, D) and step.sequence_shards > 1:
        size = (size + size // step.sequence_shards) // 2  # half the matmul inputs stay gathered
    if step.is_tpu and array.dtype == jnp.float32:
        # What only a matmul reads is kept in bfloat16: sequences merged with positions or with
        # heads, and of scores those after dropout.
        merged = {3: (L, B * T), 4: (L, B * step.model.num_kv_heads)}
        if array.shape[:2] == merged.get(array.ndim):
            return copies * size // 2
        if array.ndim == 6 and array.shape[-2:] == (T, T):
            return size + (copies - 1) * size // 2
    return copies * size


@functools.cache
def _flash_attention(is_tpu: bool, fsdp: bool) -> Callable[..., jax.Array]:
    """Return a function that keeps what every flash attention does (Dao 2023), computing nothing.

    That is its inputs, its output and the log of its denominators. On TPU they are padded to the
    lanes of the vector unit; but not queries and keys where parameters are sharded, since these are
    kept as they were before the rotary embedding.
    """

    def padded(x_BTNH: jax.Array, pads: bool = is_tpu) -> jax.Array:
        padding = -x_BTNH.shape[-1] % LANES
        return jnp.pad(x_BTNH, [(0, 0)] * 3 + [(0, padding)]) if pads and padding else x_BTNH

    @jax.custom_vjp
    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return q_BTNH

    def forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, Any]:
        inputs = (*(padded(x, is_tpu and not fsdp) for x in (q_BTNH, k_BTKH)), padded(v_BTKH))
        denominators_BTN = jnp.zeros(q_BTNH.shape[:3], jnp.float32)
        return q_BTNH + 0, (*inputs, padded(q_BTNH + 0), denominators_BTN)

    def backward(kept: Any, gradient_BTNH: jax.Array) -> tuple[jax.Array, ...]:
        H = gradient_BTNH.shape[-1]
        return gradient_BTNH, kept[1][..., :H], kept[2][..., :H]

    attend.defvjp(forward, backward)
    return lambda q_BTNH, k_BTKH, v_BTKH, *_, **__: attend(q_BTNH, k_BTKH, v_BTKH)
