"""Matrix multiplication by a few or many rows: implementations chosen by backend and row count.

Kernels are stored outputs first, [O, I], as floats or as `kernels.int4.Quantized`. Float matmuls
are XLA's, except on CPU: there XLA has one core read the matrix for a single row, where
`sum_vectors` uses all of them, and it multiplies a matrix by many columns (`outputs_first`) faster
than a few rows by a matrix. For quantised kernels:

- `sum_lanes`: on CPU, up to `FEW` rows. Two to three times as fast as float32 there, where XLA
  multiplies nothing but float32 fast.
- `by_blocks`: on CPU, more rows. As fast as float32.
- `multiply_int4`: on TPU, int4 and up to `MOST_ROWS`. A kernel of ours, since XLA reads int4 as
  floats.
- `multiply_and_reduce`: elsewhere, four bits and up to `FEW` rows. One fused loop.
- `convert`: elsewhere; XLA fuses the conversion into its matmul.

`benchmarks/matvec.py` measures them all. Gradients flow to the rows, not to a quantised kernel,
whose integers are all that the backward pass keeps of it.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.int4 import BLOCK, Quantized, halves, join, unpack
from llama_jax.kernels.int4_tpu import MOST_ROWS, multiply_int4

FEW = 4
MANY = 64  # rows from which on XLA is as fast either way
BLOCKS = 32  # int4 blocks that `sum_lanes` sums in one loop; more are slower to compile and run
VECTOR = 16  # floats that `sum_vectors` takes at a time; 8 is as fast, 24 and 32 are not
ONE_LOOP = 1024  # inputs that it takes; with more terms its loop is slower than XLA's matmul
MADE_FLOAT = 2**19  # elements of a kernel that `by_blocks` dequantises at a time
TILE_ROWS, BYTE_ROWS = 8, 32  # of a tile on TPU: of float32, of bytes
FLOAT32 = jnp.dtype(jnp.float32)


def platform() -> str:
    """The platform a program is traced for: "cpu", "gpu" or "tpu".

    That of the mesh that is set, else of this process's devices. The two differ where a program is
    compiled for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_cpu_device() -> bool:
    """Whether a program is traced for one CPU device; on a mesh, XLA shards matmuls best itself."""
    return platform() == "cpu" and _on_one_device()


def _on_one_device() -> bool:
    """Whether a program is traced for one device, as inside a `jax.shard_map` over all axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size == 1 or name in mesh.manual_axes for name, size in mesh.shape.items())


def with_rows_of_a_tile(
    multiply: Callable[..., jax.Array], x_RI: jax.Array, *operands: Any
) -> jax.Array:
    """`multiply(x, *operands)`, [R, O], on the matrix unit of a TPU also where rows are few.

    With fewer rows than a tile has, XLA sums products on the vector unit: predicted by its compiler
    to take 20 times as long. On other platforms nothing is added.
    """
    R = x_RI.shape[-2]
    if R >= TILE_ROWS or platform() != "tpu":
        return multiply(x_RI, *operands)
    rows = [(0, 0)] * (x_RI.ndim - 2) + [(0, TILE_ROWS - R), (0, 0)]
    return multiply(jnp.pad(x_RI, rows), *operands)[..., :R, :]


def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """`table[ids]`, [*ids, ...], of a table [V, ...].

    On a TPU a tile has 32 rows of bytes. To gather a few rows, XLA would first copy the whole table
    to smaller tiles; so whole tiles are gathered.
    """
    V, rows = table.shape[0], BYTE_ROWS
    is_tiled = table.dtype.itemsize == 1 and table.ndim == 2 and V % rows == 0
    if not (is_tiled and ids.size <= MOST_ROWS and platform() == "tpu" and _on_one_device()):
        return table[ids]
    tiles = jax.lax.optimization_barrier(table.reshape(V // rows, rows, -1)[ids // rows])
    places = (ids % rows)[..., None, None]
    return jnp.take_along_axis(tiles, places, axis=-2)[..., 0, :]


def prefers_outputs_first(output_dims: int) -> bool:
    """Whether decoding reads a kernel with so many dims of outputs faster outputs first.

    On TPU two dims of outputs that come last are tiled together, and to merge them XLA copies the
    matrix for every call; if they come first, it is the same memory.
    """
    return platform() == "cpu" or (platform() == "tpu" and output_dims > 1)


@partial(jax.jit, static_argnames="dtype")  # so that equal layers are traced once
def times_transposed(x_RI: jax.Array, kernel_OI: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x · kernelᵀ, [R, O] in `dtype`."""
    (R, I), floats = x_RI.shape, {x_RI.dtype, kernel_OI.dtype}
    if R <= MANY and floats == {FLOAT32} and on_one_cpu_device():
        if R <= FEW and I % VECTOR == 0 and I <= ONE_LOOP:
            return sum_vectors(x_RI, kernel_OI).astype(dtype)
        if R > 1:
            return outputs_first(x_RI, kernel_OI).astype(dtype)
    if R == 1 and platform() != "tpu":  # a matrix-vector product
        return jnp.dot(kernel_OI, x_RI[0], preferred_element_type=dtype)[None]
    multiply = partial(jnp.einsum, "RI,OI->RO", preferred_element_type=dtype)
    return with_rows_of_a_tile(multiply, x_RI, kernel_OI)


def outputs_first(x_RI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """XLA's matmul as kernel · xᵀ, kept apart: fused with what follows, it is slower."""
    return jax.lax.optimization_barrier(kernel_OI @ x_RI.T).T


def sum_vectors(x_RI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """Sums of products, `VECTOR` adjacent inputs at a time; [R, O] in the dtype of both."""
    x_RI = jax.lax.optimization_barrier(x_RI)  # else each output recomputes it
    terms_ORL = (
        kernel_OI[:, None, start : start + VECTOR] * x_RI[None, :, start : start + VECTOR]
        for start in range(0, x_RI.shape[1], VECTOR)
    )
    return _over_lanes(reduce(jnp.add, terms_ORL))


@partial(jax.jit, static_argnames="dtype")
def times_quantized(x_RI: jax.Array, kernel: Quantized, dtype: jnp.dtype) -> jax.Array:
    """x · kernelᵀ, [R, O] in `dtype`, for a quantised kernel; it has no gradient by the kernel.

    The kernel's output and input dims may be several: merged here, the integers that the backward
    pass keeps are those that came in, and a scan over stacked kernels makes no copy of them.
    """
    return _times_quantized(x_RI, kernel, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _times_quantized(x_RI: jax.Array, kernel: Quantized, dtype: jnp.dtype) -> jax.Array:
    # Tied to x, which changes: else XLA would hoist the dequantisation out of the decode loop.
    kernel, x_RI = jax.lax.optimization_barrier((kernel.merged(), x_RI))
    return implementation_for(x_RI.shape[0], kernel)(x_RI, kernel).astype(dtype)


def _forward(x_RI, kernel, dtype):  # type: ignore[no-untyped-def]
    nothing_0I = x_RI[:0]  # x's width and dtype
    return _times_quantized(x_RI, kernel, dtype), (nothing_0I, kernel)


def _backward(_dtype, residuals, gradient_RO):  # type: ignore[no-untyped-def]
    (nothing_0I, kernel), dtype = residuals, residuals[0].dtype
    kernel, gradient_RO = jax.lax.optimization_barrier((kernel.merged(), gradient_RO))
    multiply = blocks_transposed if on_one_cpu_device() else convert_transposed
    return multiply(gradient_RO.astype(dtype), kernel, nothing_0I.shape[1]).astype(dtype), None


_times_quantized.defvjp(_forward, _backward)


def implementation_for(rows: int, kernel: Quantized) -> Callable[[jax.Array, Quantized], jax.Array]:
    """The fastest implementation here for so many rows."""
    if on_one_cpu_device():
        return sum_lanes if rows <= FEW else by_blocks
    if kernel.kind == "int4" and rows <= MOST_ROWS and platform() == "tpu" and _on_one_device():
        return multiply_int4
    return multiply_and_reduce if rows <= FEW and kernel.kind != "int8" else convert


def convert(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """XLA's matmul with the kernel converted to x's dtype on the way; float32 [R, O]."""
    products = [
        times_transposed(x_RP, part.dequantize(x_RI.dtype), FLOAT32)
        for x_RP, part in unpack(x_RI, kernel)
    ]
    return _scaled(reduce(jnp.add, products), kernel)


def multiply_and_reduce(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """Sums of products whose kernel is never stored as floats; float32 [R, O]."""
    terms_ROP = [
        part.dequantize(FLOAT32)[None] * x_RP.astype(FLOAT32)[:, None]
        for x_RP, part in unpack(x_RI, kernel)
    ]
    return _scaled(reduce(jnp.add, terms_ROP).sum(axis=-1), kernel)


def by_blocks(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """`convert` a block of outputs at a time, so that few of its floats exist; [R, O]."""
    (R, I), O = x_RI.shape, kernel.values.shape[0]
    wide_RI = x_RI.astype(FLOAT32)
    blocks = math.ceil(O * I / MADE_FLOAT)
    size = math.ceil(O / blocks)

    def add_block(index: jax.Array, out_RO: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, O - size)  # the last block may overlap the one before
        block = convert(wide_RI, kernel.rows(start, size))
        return jax.lax.dynamic_update_slice_in_dim(out_RO, block, start, axis=1)

    return jax.lax.fori_loop(0, blocks, add_block, jnp.zeros((R, O), FLOAT32))


def convert_transposed(y_RO: jax.Array, kernel: Quantized, inputs: int) -> jax.Array:
    """y · kernel, the transpose of `convert`, in the dtype of y but for float32 sums; [R, I]."""
    y_RO = _scaled(y_RO.astype(FLOAT32), kernel).astype(y_RO.dtype)
    parts_RP = [
        jnp.dot(y_RO, part.dequantize(y_RO.dtype), preferred_element_type=FLOAT32)
        for part in halves(kernel)
    ]
    return join(parts_RP, inputs)


def blocks_transposed(y_RO: jax.Array, kernel: Quantized, inputs: int) -> jax.Array:
    """`convert_transposed` a block of outputs at a time, so that few floats exist; [R, I]."""
    R, O = y_RO.shape
    wide_RO = y_RO.astype(FLOAT32)
    blocks = math.ceil(O * inputs / MADE_FLOAT)
    size = math.ceil(O / blocks)

    def add_block(index: jax.Array, sum_RI: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, O - size)
        y_RB = jax.lax.dynamic_slice_in_dim(wide_RO, start, size, axis=1)
        is_new_B = start + jnp.arange(size) >= index * size  # others were added before
        y_RB = jnp.where(is_new_B[None], y_RB, 0.0)
        return sum_RI + convert_transposed(y_RB, kernel.rows(start, size), inputs)

    return jax.lax.fori_loop(0, blocks, add_block, jnp.zeros((R, inputs), FLOAT32))


def sum_lanes(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """Sums of products over runs of inputs, lane by lane, then over the lanes; float32 [R, O].

    The first sum is written out, one term per run: XLA compiles it to one loop over adjacent
    numbers with the sums in registers. A reduction would become a scalar loop or a slower library
    call.
    """
    wide_RI, I = x_RI.astype(FLOAT32), x_RI.shape[1]
    length = _run_length(I) if kernel.kind == "int8" else BLOCK
    runs = [(wide_RI[:, i : i + length], kernel.inputs(i, length)) for i in range(0, I, length)]
    most = len(runs) if kernel.kind == "int8" else BLOCKS
    sums_RO = [_sum_runs(runs[i : i + most]) for i in range(0, len(runs), most)]
    return reduce(jnp.add, sums_RO)


def _sum_runs(runs: list[tuple[jax.Array, Quantized]]) -> jax.Array:
    """The sum [R, O] of the products of some runs."""
    terms_ORL = (
        part.dequantize(FLOAT32)[:, None] * x_RL[None]
        for x_RI, run in runs
        for x_RL, part in unpack(x_RI, run)
    )
    lanes_ORL = reduce(jnp.add, terms_ORL)
    if runs[0][1].kind == "int8":
        lanes_ORL *= runs[0][1].scale.astype(FLOAT32)[:, None, None]
    return _over_lanes(lanes_ORL)


def _over_lanes(lanes_ORL: jax.Array) -> jax.Array:
    """The sums [R, O] over the lanes, as a matmul, since a reduction would be a scalar loop."""
    O, R, L = lanes_ORL.shape
    return jnp.dot(lanes_ORL.reshape(O * R, L), jnp.ones(L)).reshape(O, R).T


def _run_length(inputs: int) -> int:
    """Inputs per run: a few vectors long, with at least a dozen runs where possible."""
    for length in (128, 96, 64, 48):
        if inputs % length == 0 and inputs // length >= 12:
            return length
    return next((n for n in (32, *range(128, 15, -1)) if inputs % n == 0), inputs)


def _scaled(sums_RO: jax.Array, kernel: Quantized) -> jax.Array:
    """Sums times the scale of each output; four-bit products were scaled by block already."""
    return sums_RO if kernel.kind != "int8" else sums_RO * kernel.scale.astype(FLOAT32)[None]
