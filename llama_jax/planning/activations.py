"""What a forward pass leaves on one device for the backward pass, read off the traced program.

The model itself is traced with the sizes that one device has, and JAX asked what it would keep:
a change of the model or of its rematerialisation shows here by itself. Nothing is computed.
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
class Pass:
    """A forward pass of some rows on one device."""

    length: int  # tokens of a row
    remat: str
    backend: str  # the attention kernel
    is_tpu: bool
    packed: bool  # with several documents a row
    stream_parts: int = 1  # parts that the stream between blocks is cut into along the sequence
    fsdp: int = 1  # devices that parameters are cut over


def kept_bytes(model: ModelConfig, rows: int, forward: Pass) -> int:
    """Bytes kept from the forward to the backward pass, of all blocks and of the loss.

    `model` is one device's share, and `rows` are the sequences on that device.
    """
    whole = dataclasses.replace(forward, stream_parts=1)  # the same program however it is cut

    def of(rows: int) -> int:
        arrays = _kept_arrays(model, rows, whole)
        return sum(_bytes(array, n, model, rows, forward) for array, n in arrays.items())

    few = min(rows, 2)
    first, last = of(max(1, few - 1)), of(few)
    return last + (rows - few) * (last - first)  # each further row adds as much as the second


@functools.cache
def _kept_arrays(config: ModelConfig, rows: int, forward: Pass) -> Counter[jax.ShapeDtypeStruct]:
    """What differentiating the loss keeps, the parameters themselves aside: how many of each."""
    tokens_BT = jax.ShapeDtypeStruct((rows, forward.length), jnp.int32)
    weights_BT = jax.ShapeDtypeStruct((rows, forward.length), jnp.float32)
    # What is offloaded lies on the host: the device keeps as much as without it.
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

    program = _traced(residuals, config, forward.fsdp, tokens_BT, weights_BT)
    given = {id(variable) for variable in program.invars}
    new = {id(v): v.aval for v in program.outvars if id(v) not in given and hasattr(v, "aval")}
    kept = Counter(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in new.values())
    return kept - _repeated_inputs(config, rows, forward)


_model = functools.cache(abstract)


def _traced(function: Callable[..., Any], config: ModelConfig, fsdp: int, *batch: Any) -> Any:
    """The program of a function of a model and its batch, as one of `fsdp` devices runs it."""
    model = _model(config)
    if fsdp == 1:
        return jax.make_jaxpr(function)(model, *batch).jaxpr
    sizes = (1, fsdp, 1)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    parts = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype),
        model,
        shardings(model, mesh),  # type: ignore[arg-type]
    )
    everywhere = PartitionSpec()  # what is given is already one device's part
    on_one = jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    (equation,) = jax.make_jaxpr(on_one)(parts, *batch).jaxpr.eqns
    return equation.params["jaxpr"]


def _repeated_inputs(config: ModelConfig, rows: int, forward: Pass) -> Counter[Any]:
    """What XLA keeps once and JAX names again: queries, keys and values read one input, so do gate
    and up. Where parameters are cut, nothing that only has another shape is kept."""
    if forward.remat != "none" or forward.fsdp > 1:
        return Counter()
    shape = (config.num_layers, rows * forward.length, config.dim)
    return Counter({jax.ShapeDtypeStruct(shape, jnp.dtype(config.compute_dtype)): 3})


def _bytes(array: Any, copies: int, config: ModelConfig, rows: int, forward: Pass) -> int:
    """Bytes that one device keeps of so many arrays of one description."""
    T, L = forward.length, config.num_layers
    size = math.prod(array.shape) * (getattr(array.dtype, "itemsize", None) or 4)  # a key has 4
    if array.ndim == 5 and array.shape[-2:] == (T, T):
        return 0  # [K, B, G, T, S] without a layer: a mask of all blocks, which XLA makes anew
    if array.shape[-2:] == (T, config.dim):
        return copies * size // forward.stream_parts
    is_read = array.shape[-2:] == (rows * T, config.dim)  # by matmuls
    if is_read and forward.stream_parts > 1:
        size = (size + size // forward.stream_parts) // 2  # half of them are kept gathered
    if forward.is_tpu and array.dtype == jnp.float32:  # what only a matmul reads is in bfloat16:
        # rows merged with positions or with heads; of scores, those that dropout has been over.
        merged = {3: (L, rows * T), 4: (L, rows * config.num_kv_heads)}
        if array.shape[:2] == merged.get(array.ndim):
            return copies * size // 2
        if array.ndim == 6 and array.shape[-2:] == (T, T):
            return size + (copies - 1) * size // 2
    return copies * size


def _kernel(forward: Pass) -> Callable[..., jax.Array]:
    """The attention kernel, or what stands in for those that keep their scores to themselves."""
    return xla_attention if forward.backend == "xla" else _Flash(forward.is_tpu, forward.fsdp > 1)


@dataclasses.dataclass(frozen=True)
class _Flash:
    """Keeps what every flash attention keeps (Dao 2023): inputs, output, log of denominators.

    On TPU these have heads as wide as the vector unit, filled up; where parameters are cut, queries
    and keys have not, since these are kept as they were before positions were rotated in.
    """

    is_tpu: bool
    is_cut: bool

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *_: Any
    ) -> jax.Array:
        more = -q_BTNH.shape[-1] % LANES if self.is_tpu else 0
        return _flash(q_BTNH, k_BTKH, v_BTKH, 0 if self.is_cut else more, more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, more_qk: int, more_v: int) -> jax.Array:
    return q


def _flash_forward(q, k, v, more_qk, more_v):  # type: ignore[no-untyped-def]
    def wide(x: jax.Array, more: int) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) if more else x

    inputs = (wide(q, more_qk), wide(k, more_qk), wide(v, more_v))
    return q + 0, (*inputs, wide(q + 0, more_v), jnp.zeros(q.shape[:3], jnp.float32))


def _flash_backward(_qk, _v, kept, slope):  # type: ignore[no-untyped-def]
    H = slope.shape[-1]
    return slope, kept[1][..., :H], kept[2][..., :H]


_flash.defvjp(_flash_forward, _flash_backward)
