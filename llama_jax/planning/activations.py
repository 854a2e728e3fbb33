"""What a forward pass leaves on one device for the backward pass, read off the traced program.

The model itself is traced with the sizes that one device has, and JAX asked what it would keep:
a change of the model or of its rematerialisation shows here by itself. Nothing is computed.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.loss import summed_nll
from llama_jax.model import abstract
from llama_jax.self_attention import BACKENDS

LANES = 128  # numbers in a row of a TPU's memory tiles


@dataclasses.dataclass(frozen=True)
class Pass:
    """A forward pass of some rows on one device."""

    length: int  # tokens of a row
    remat: str
    backend: str  # the attention kernel
    is_tpu: bool
    packed: bool  # with several documents a row
    stream_parts: int = 1  # parts that the stream between blocks is cut into along the sequence
    is_cut: bool = False  # whether parameters are gathered anew for each block's backward pass


def kept_bytes(model: ModelConfig, rows: int, forward: Pass) -> int:
    """Bytes kept from the forward to the backward pass, of all blocks and of the loss.

    `model` is one device's share, and `rows` are the sequences on that device.
    """
    few = min(rows, 2)
    first, last = (_residual_bytes(model, n, forward) for n in (max(1, few - 1), few))
    return last + (rows - few) * (last - first)  # each further row adds as much as the second


@functools.cache
def _residual_bytes(config: ModelConfig, rows: int, forward: Pass) -> int:
    """Bytes of what differentiating the loss keeps, the parameters themselves aside."""
    tokens_BT = jax.ShapeDtypeStruct((rows, forward.length), jnp.int32)
    weights_BT = jax.ShapeDtypeStruct((rows, forward.length), jnp.float32)
    # What is offloaded lies on the host: the device keeps as much as without it.
    remat = "block" if forward.remat == "offload" else forward.remat

    def residuals(model: Any, tokens_BT: jax.Array, weights_BT: jax.Array) -> list[Any]:
        def loss(model: Any) -> jax.Array:
            hidden_BTD, _ = model.hidden(
                tokens_BT,
                segments_BT=tokens_BT if forward.packed else None,
                dropout_key=jax.random.key(0) if config.dropout else None,
                remat=remat,
                attention=_kernel(forward),
            )
            return summed_nll(hidden_BTD, model.output_VD, tokens_BT, weights_BT)

        return jax.tree.leaves(jax.vjp(loss, model)[1])

    program = jax.make_jaxpr(residuals)(abstract(config), tokens_BT, weights_BT).jaxpr
    given = {id(variable) for variable in program.invars}
    new = {id(v): v.aval for v in program.outvars if id(v) not in given and hasattr(v, "aval")}
    kept = Counter(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in new.values())
    if forward.is_cut:
        kept -= Counter(matrices(config))
    kept -= _repeated_inputs(config, rows, forward)
    return sum(n * _bytes(array, config, rows, forward) for array, n in kept.items())


def _repeated_inputs(config: ModelConfig, rows: int, forward: Pass) -> Counter[Any]:
    """What XLA keeps once and JAX names again: queries, keys and values read one input, so do gate
    and up."""
    if forward.remat != "none":
        return Counter()
    shape = (config.num_layers, rows * forward.length, config.dim)
    return Counter({jax.ShapeDtypeStruct(shape, jnp.dtype(config.compute_dtype)): 3})


def matrices(config: ModelConfig) -> list[Any]:
    """The matrices of all blocks as products take them, inputs first and in the compute dtype."""
    D, F, H = config.dim, config.ffn_dim, config.head_dim
    queries, keys = config.num_heads * H, config.num_kv_heads * H
    shapes = [(D, queries), (D, keys), (D, keys), (queries, D), (D, F), (D, F), (F, D)]
    dtype = jnp.dtype(config.compute_dtype)
    return [jax.ShapeDtypeStruct((config.num_layers, *shape), dtype) for shape in shapes]


def _bytes(array: Any, config: ModelConfig, rows: int, forward: Pass) -> int:
    """Bytes that one device keeps of an array, given its description."""
    size = math.prod(array.shape) * (getattr(array.dtype, "itemsize", None) or 4)  # a key has 4
    T = forward.length
    if array.ndim == 5 and array.shape[-2:] == (T, T):
        return 0  # [K, B, G, T, S] without a layer: a mask of all blocks, which XLA makes anew
    # Rows merged with positions or with heads are what a matmul takes, on TPUs in bfloat16.
    merged = {3: (config.num_layers, rows * T), 4: (config.num_layers, rows * config.num_kv_heads)}
    is_operand = array.shape[:2] == merged.get(array.ndim)
    if forward.is_tpu and is_operand and array.dtype == jnp.float32:
        return size // 2
    if array.shape[-2:] == (T, config.dim):
        return size // forward.stream_parts
    return size


def _kernel(forward: Pass) -> Callable[..., jax.Array]:
    """The attention kernel, or what stands in for those that keep their scores to themselves."""
    return BACKENDS["xla"] if forward.backend == "xla" else _Flash(forward.is_tpu)


@dataclasses.dataclass(frozen=True)
class _Flash:
    """Keeps what every flash attention keeps (Dao 2023): inputs, output, log of denominators.

    On TPU these have heads as wide as the vector unit, filled up.
    """

    is_tpu: bool

    def __call__(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *_: Any
    ) -> jax.Array:
        H = q_BTNH.shape[-1]
        more = -H % LANES if self.is_tpu else 0
        wide = (jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) for x in (q_BTNH, k_BTKH, v_BTKH))
        return _flash(*wide)[..., :H]


@jax.custom_vjp
def _flash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    return q_BTNH


def _flash_forward(q, k, v):  # type: ignore[no-untyped-def]
    out = q + 0  # an array of its own
    return out, (q, k, v, out, jnp.zeros(q.shape[:3], jnp.float32))


def _flash_backward(kept: Iterable[jax.Array], slope: jax.Array) -> tuple[jax.Array, ...]:
    _, k, v, *_ = kept
    return slope, k, v


_flash.defvjp(_flash_forward, _flash_backward)
