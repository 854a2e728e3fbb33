"""What a forward pass keeps on one device for the backward pass, read off the traced program.

The model itself is traced with the sizes of one device's shard, and JAX reports the residuals: a
change of the model or of its rematerialisation shows here by itself. What XLA makes of a residual
follows from where it comes from and what reads it, never from its shape. Nothing is computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from llama_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from llama_jax.distributed.fsdp import example_ids, gather, lookup
from llama_jax.distributed.mesh import MESH_AXES, shardings
from llama_jax.kernels.attention import DROPS_WEIGHTS, xla_attention
from llama_jax.kernels.blockwise import KEPT
from llama_jax.kernels.splash import LANES
from llama_jax.model.execution import QKV, Execution
from llama_jax.training.loss import summed_nll
from llama_jax.training.objectives import model_of
from llama_jax.training.step import UNROLLED_ON_CPU, abstract_state

NO_ADAPTERS = LoraConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceStep:
    """One device's shard of a train step."""

    model: ModelConfig  # what the device computes, see `planning.memory.model_shard`
    batch: int  # sequences of a microbatch on the device
    length: int  # tokens of a sequence
    remat: str
    attention: str  # the kernel
    is_tpu: bool
    lora: LoraConfig = NO_ADAPTERS
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
        # The trace is the same for every sharding of the stream.
        residuals = _residuals(dataclasses.replace(step, batch=batch, sequence_shards=1))
        return sum(_kept_bytes(value, step) for value in residuals)

    few = min(step.batch, 2)
    first, last = traced(max(1, few - 1)), traced(few)
    return last + (step.batch - few) * (last - first)  # each further one adds as much as the second


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the traced program; reshaped, it is the same value."""

    nbytes: int
    dtype: Any
    is_stream: bool = False  # the residual stream, or computed from it without a matmul
    head: int = 0  # of queries, keys and values: the width of a head, their last dim
    is_rotated: bool = False  # of these, queries and keys
    readers: set[str] = dataclasses.field(default_factory=set)  # primitives that take it as input
    stacked: "Value | None" = None  # of the body of a scan: the values of all iterations


def _kept_bytes(value: Value, step: DeviceStep) -> int:
    """Return the bytes that one device keeps of a residual.

    What only matmuls read, XLA keeps as they read it: gathered, and on TPU in bfloat16. With
    sharded parameters it cannot, since `Execution.rematerialized` puts blocks in `jax.checkpoint`.
    """
    is_named = value.head and step.remat in ("save-matmuls", "save-qkv")
    # XLA then lays heads along the lanes; positions, where heads are narrow and were rotated.
    if is_named and step.is_tpu and (value.head >= LANES // 2 or not value.is_rotated):
        return value.nbytes // value.head * (value.head + -value.head % LANES)
    as_read = value.readers == {"dot_general"} and step.fsdp == 1
    if as_read and step.is_tpu and value.dtype == jnp.float32:
        return value.nbytes // 2
    if value.is_stream and not as_read:
        return value.nbytes // step.sequence_shards
    return value.nbytes


@functools.cache
def _residuals(step: DeviceStep) -> list[Value]:
    """Return what differentiating the loss keeps, parameters and tokens aside.

    The program that is read returns the residuals, and runs the backward pass that reads them.
    """
    config = state_config(Config(model=step.model, lora=step.lora, **IRRELEVANT))
    execution = Execution(
        attention=xla_attention if step.attention == "xla" else _flash_attention(step),
        drops_weights=step.attention in DROPS_WEIGHTS,
        # Offloaded residuals are in the host's memory: the device keeps as much as without them.
        remat="block" if step.remat == "offload" else step.remat,
        unroll=UNROLLED_ON_CPU if step.remat == "none" else 1,
        constrain=_named,
        gather=gather if step.fsdp > 1 else None,
        lookup=lookup,
        example_ids=example_ids,
    )

    def program(
        parts: tuple[Any, Any], tokens_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[list[Any], Any]:
        trainable, frozen = parts
        key = jax.random.key(0) if step.model.dropout or step.lora.dropout else None

        def hidden(trainable: Any) -> jax.Array:
            model = model_of(config, trainable, frozen, execution=execution, dropout_key=key)
            return model.hidden(
                tokens_BT,
                segments_BT=tokens_BT if step.packed else None,
                dropout_key=key,
                execution=execution,
            )[0]

        hidden_BTD, backward = jax.vjp(hidden, trainable)
        # The loss keeps nothing but its gradients, which it computes together with its value. That
        # by a frozen output matrix is not computed.
        output_VD = model_of(config, trainable, frozen, execution=execution).output_VD
        loss_gradients = jax.grad(summed_nll, argnums=(0,) if step.lora.rank else (0, 1))
        gradient_BTD, *others = loss_gradients(hidden_BTD, output_VD, tokens_BT, weights_BT)
        gradient_BTD = _named(gradient_BTD, STREAM)
        kept = [*jax.tree.leaves(backward), gradient_BTD, *others]
        return kept, backward(gradient_BTD)

    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1, step.fsdp, 1), MESH_AXES, axis_types=axis_types)
    state = abstract_state(config)
    parts = state.trainable, state.frozen
    shards = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        parts,
        shardings(parts, mesh),
    )
    batch = [
        jax.ShapeDtypeStruct((step.batch, step.length), dtype) for dtype in (jnp.int32, jnp.float32)
    ]
    replicated = PartitionSpec()  # the inputs are one device's shards already
    on_one = jax.shard_map(
        program, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False
    )
    traced, (kept, _) = jax.make_jaxpr(on_one, return_shape=True)(shards, *batch)
    inputs = [_value(variable.aval) for variable in traced.jaxpr.invars]
    residuals = dict.fromkeys(_outputs(traced.jaxpr, inputs)[: len(kept)])
    return [value for value in residuals if value not in inputs]


# Settings that neither the train state nor what a device keeps depends on.
IRRELEVANT: Any = {
    "data": DataConfig(path="none", batch_size=1, sequence_length=2, packing="documents"),
    "optimizer": OptimizerConfig(steps=1, learning_rate=0.1, warmup_steps=0),
    "run": RunConfig(init_from="none"),
}


def state_config(config: Config) -> Config:
    """Return a config of the same train state, equal for all configs that have it."""
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=1)
    others = IRRELEVANT | {"optimizer": optimizer}
    return Config(model=config.model, lora=config.lora, **others)


# ---- the traced program ----

STREAM = "residual"  # the last logical axis of the residual stream where the model constrains it
# Primitives whose output is their input in another layout (`jax.checkpoint` adds the fifth): XLA
# keeps the input, once for all of them.
VIEWS = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "reduce_precision", "name"}


def _named(x: jax.Array, *axes: str) -> jax.Array:
    """Return `x`, named in the program by its last logical axis."""
    return checkpoint_name(x, axes[-1])


def _outputs(jaxpr: Any, inputs: list[Value]) -> list[Value]:
    """Return the outputs of a program for its inputs, and add to each value what reads it."""
    values = dict(zip(jaxpr.invars, inputs))
    values |= {variable: _value(variable.aval) for variable in jaxpr.constvars}

    def of(atoms: list[Any]) -> list[Value]:
        return [_value(atom.aval) if isinstance(atom, Literal) else values[atom] for atom in atoms]

    for equation in jaxpr.eqns:
        name, arguments = equation.primitive.name, of(equation.invars)
        inner = next(jaxprs_in_params(equation.params), None)
        if name == "scan":
            results = _scanned(equation, inner, arguments)
        elif inner is not None and len(inner.invars) == len(arguments):
            results = _outputs(inner, arguments)
        elif name in VIEWS:
            results = arguments[:1]
            results[0].is_stream |= equation.params.get("name") == STREAM
            if equation.params.get("name") in QKV:
                results[0].head = equation.outvars[0].aval.shape[-1]
                results[0].is_rotated = equation.params["name"] != "values"
        else:
            is_stream = name != "dot_general" and any(value.is_stream for value in arguments)
            results = [_value(variable.aval, is_stream) for variable in equation.outvars]
            for value in arguments:
                value.readers.add(name)
        values |= zip(equation.outvars, results)
    return of(jaxpr.outvars)


def _scanned(equation: Any, body: Any, arguments: list[Value]) -> list[Value]:
    """Return the outputs of a scan: the final carry, and the stacked outputs of its body."""
    # Told apart by rank, since what the equation says of them changes between versions of JAX:
    # the body has a dimension less of what is stacked. Constants come first, then the carry.
    last = sum(map(_same_rank, equation.invars, body.invars))
    first = last - sum(map(_same_rank, equation.outvars, body.outvars))
    carry = [
        _value(variable.aval, value.is_stream)
        for variable, value in zip(body.invars[first:last], arguments[first:last])
    ]
    inputs = [*arguments[:first], *carry, *arguments[last:]]
    results = _outputs(body, inputs)
    for index, value in enumerate(results[len(carry) :], len(carry)):
        if value in carry or value not in inputs:  # other inputs are parameters, stacked already
            if value.stacked is None:
                nbytes = value.nbytes * equation.params["length"]
                value.stacked = dataclasses.replace(value, nbytes=nbytes, readers=set())
            results[index] = value.stacked
    return results


def _same_rank(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) == len(inner.aval.shape)


def _value(aval: Any, is_stream: bool = False) -> Value:
    itemsize = getattr(aval.dtype, "itemsize", None) or 4  # a key has 4
    return Value(math.prod(aval.shape) * itemsize, aval.dtype, is_stream)


def _flash_attention(step: DeviceStep) -> Callable[..., jax.Array]:
    """Return a function that keeps what every flash attention does (Dao 2023), computing nothing.

    That is its inputs, its output and the log of its denominators. On TPU they are padded to the
    lanes of the vector unit; but not queries and keys where parameters are sharded, since these are
    kept as they were before the rotary embedding.
    """

    def padded(x_BTNH: jax.Array, pads: bool = step.is_tpu) -> jax.Array:
        padding = -x_BTNH.shape[-1] % LANES
        return jnp.pad(x_BTNH, [(0, 0)] * 3 + [(0, padding)]) if pads and padding else x_BTNH

    @jax.custom_vjp
    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return q_BTNH

    def forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, Any]:
        inputs = (
            *(padded(x, step.is_tpu and step.fsdp == 1) for x in (q_BTNH, k_BTKH)),
            padded(v_BTKH),
        )
        denominators_BTN = checkpoint_name(jnp.sum(q_BTNH, axis=-1, dtype=jnp.float32), KEPT)
        out_BTNH = checkpoint_name(padded(q_BTNH + 0), KEPT)
        # Another array, as the next matmul reads it.
        read_BTNH = out_BTNH[..., : q_BTNH.shape[-1]] + 0
        return read_BTNH, (*inputs, out_BTNH, denominators_BTN)

    def backward(kept: Any, gradient_BTNH: jax.Array) -> tuple[jax.Array, ...]:
        # Additions, lest the inputs look as if matmuls alone read them.
        q_BTNH, k_BTKH, v_BTKH = (x[..., : gradient_BTNH.shape[-1]] for x in kept[:3])
        return gradient_BTNH + q_BTNH, k_BTKH + 0, v_BTKH + 0

    attend.defvjp(forward, backward)
    return lambda q_BTNH, k_BTKH, v_BTKH, *_, **__: attend(q_BTNH, k_BTKH, v_BTKH)
