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


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """The settings of a forward pass on one device."""

    length: int  # tokens of a sequence
    remat: str
    backend: str  # the attention kernel
    is_tpu: bool
    packed: bool  # with several documents per sequence
    sequence_shards: int = 1  # shards of the residual stream between blocks
    fsdp: int = 1  # shards of the parameters


def residual_bytes(model: ModelConfig, batch: int, forward: ForwardPass) -> int:
    """Return the bytes of the residuals of all blocks and of the loss.

    Args:
      model: one device's shard, see `planning.memory.model_shard`.
      batch: sequences on that device.
    """
    unsharded = dataclasses.replace(forward, sequence_shards=1)  # the traced program is the same

    def traced(batch: int) -> int:
        arrays = _residuals(model, batch, unsharded)
        return sum(_bytes(array, n, model, batch, forward) for array, n in arrays.items())

    few = min(batch, 2)
    first, last = traced(max(1, few - 1)), traced(few)
    return last + (batch - few) * (last - first)  # each further sequence adds as much as the second


@functools.cache
def _residuals(
    config: ModelConfig, batch: int, forward: ForwardPass
) -> Counter[jax.ShapeDtypeStruct]:
    """Return how many arrays of each kind differentiating the loss keeps, parameters aside."""
    tokens_BT = jax.ShapeDtypeStruct((batch, forward.length), jnp.int32)
    weights_BT = jax.ShapeDtypeStruct((batch, forward.length), jnp.float32)
    # Offloaded residuals are in the host's memory: the device keeps as much as without them.
    remat = "block" if forward.remat == "offload" else forward.remat

    execution = Execution(
        attention=_kernel(forward),
        remat=remat,
        unroll=UNROLLED_ON_CPU if remat == "none" else 1,
        constrain=constrain,
        gather=gather if forward.fsdp > 1 else None,
        lookup=lookup,
        example_ids=example_ids,
    )

    def residuals(model: Any, tokens_BT: jax.Array, weights_BT: jax.Array) -> list[Any]:
        def loss(model: Any) -> jax.Array:
            hidden_BTD, _ = model.hidden(
                tokens_BT,
                segments_BT=tokens_BT if forward.packed else None,
                dropout_key=jax.random.key(0) if config.dropout else None,
                execution=execution,
            )
            return summed_nll(hidden_BTD, model.output_VD, tokens_BT, weights_BT)

        return jax.tree.leaves(jax.vjp(loss, model)[1])

    program = _trace(residuals, config, forward.fsdp, tokens_BT, weights_BT)
    inputs = {id(variable) for variable in program.invars}
    new = {id(v): v.aval for v in program.outvars if id(v) not in inputs and hasattr(v, "aval")}
    kept = Counter(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in new.values())
    return kept - _repeated_inputs(config, batch, forward)


_model = functools.cache(abstract)


def _trace(function: Callable[..., Any], config: ModelConfig, fsdp: int, *batch: Any) -> Any:
    """Return the program of a function of a model and its batch on one of `fsdp` devices."""
    model = _model(config)
    if fsdp == 1:
        return jax.make_jaxpr(function)(model, *batch).jaxpr
    sizes = (1, fsdp, 1)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    shards = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        model,
        shardings(model, mesh),  # type: ignore[arg-type]
    )
    replicated = PartitionSpec()  # the inputs are one device's shards already
    on_one = jax.shard_map(
        function, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False
    )
    (equation,) = jax.make_jaxpr(on_one)(shards, *batch).jaxpr.eqns
    return equation.params["jaxpr"]


def _repeated_inputs(config: ModelConfig, batch: int, forward: ForwardPass) -> Counter[Any]:
    """Return what JAX lists repeatedly and XLA keeps once.

    Queries, keys and values read one input, gate and up another. With sharded parameters JAX keeps
    nothing that is only a reshaped copy.
    """
    if forward.remat != "none" or forward.fsdp > 1:
        return Counter()
    shape = (config.num_layers, batch * forward.length, config.dim)
    return Counter({jax.ShapeDtypeStruct(shape, jnp.dtype(config.compute_dtype)): 3})


def _bytes(array: Any, copies: int, config: ModelConfig, batch: int, forward: ForwardPass) -> int:
    """Return the bytes that one device keeps of `copies` arrays."""
    T, L = forward.length, config.num_layers
    size = math.prod(array.shape) * (getattr(array.dtype, "itemsize", None) or 4)  # a key has 4
    if array.ndim == 5 and array.shape[-2:] == (T, T):
        return 0  # [K, B, G, T, S] without layers: the mask of all blocks, which XLA recomputes
    if array.shape[-2:] == (T, config.dim):
        return copies * size // forward.sequence_shards
    is_matmul_input = array.shape[-2:] == (batch * T, config.dim)
    if is_matmul_input and forward.sequence_shards > 1:
        size = (size + size // forward.sequence_shards) // 2  # half of them are kept gathered
    if forward.is_tpu and array.dtype == jnp.float32:
        # What only a matmul reads is kept in bfloat16: sequences merged with positions or with
        # heads, and of scores those after dropout.
        merged = {3: (L, batch * T), 4: (L, batch * config.num_kv_heads)}
        if array.shape[:2] == merged.get(array.ndim):
            return copies * size // 2
        if array.ndim == 6 and array.shape[-2:] == (T, T):
            return size + (copies - 1) * size // 2
    return copies * size


def _kernel(forward: ForwardPass) -> Callable[..., jax.Array]:
    """Return the attention kernel, or a stand-in for those that keep no scores."""
    return xla_attention if forward.backend == "xla" else _Flash(forward.is_tpu, forward.fsdp > 1)


@dataclasses.dataclass(frozen=True)
class _Flash:
    """Keeps what every flash attention keeps (Dao 2023): inputs, output, log of denominators.

    On TPU they are padded to the lanes of the vector unit; but not queries and keys where
    parameters are sharded, since these are kept as they were before the rotary embedding.
    """

    is_tpu: bool
    fsdp: bool

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *_: Any
    ) -> jax.Array:
        padding = -q_BTNH.shape[-1] % LANES if self.is_tpu else 0
        return _flash(q_BTNH, k_BTKH, v_BTKH, 0 if self.fsdp else padding, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, qk_padding: int, v_padding: int) -> jax.Array:
    return q


def _flash_forward(q, k, v, qk_padding, v_padding):  # type: ignore[no-untyped-def]
    def padded(x: jax.Array, padding: int) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * 3 + [(0, padding)]) if padding else x

    inputs = (padded(q, qk_padding), padded(k, qk_padding), padded(v, v_padding))
    return q + 0, (*inputs, padded(q + 0, v_padding), jnp.zeros(q.shape[:3], jnp.float32))


def _flash_backward(_qk, _v, residuals, gradient):  # type: ignore[no-untyped-def]
    H = gradient.shape[-1]
    return gradient, residuals[1][..., :H], residuals[2][..., :H]


_flash.defvjp(_flash_forward, _flash_backward)
