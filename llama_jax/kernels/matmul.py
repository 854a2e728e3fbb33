"""Which kind of device a program is being traced for: forms of arithmetic are chosen by it."""

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce

import jax
import jax.numpy as jnp

from llama_jax.kernels.int4 import BLOCK, Quantized, parts, split


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh that is set, else of this process's devices.

    The two differ where a program is compiled for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


# How a matrix multiplies rows: the one place that chooses a form by backend and number of rows.
#
# Kernels lie outputs first, [O, I], as floats or as `packing.Quantized`. What they are for is not
# known here. Floats are multiplied by the library, except on CPU. There it has one core read the
# matrix for a single row, where `sum_vectors` has all of them; and it takes a matrix times many
# columns (`outputs_first`) faster than few rows times a matrix. The forms of a quantised product:
#
# - `sum_lanes`: on CPU, up to `FEW` rows. Two to three times as fast as float32 there, where the
#   library multiplies nothing but float32 fast.
# - `by_blocks`: on CPU, more rows. As fast as float32.
# - `multiply_and_reduce`: elsewhere, four bits and up to `FEW` rows. All of it is one loop.
# - `convert`: elsewhere; the compiler fuses the conversion into the library's product.
#
# `benchmarks/matvec.py` measures them all.

FEW = 4
MANY = 64  # rows from which on the library is as fast either way
BLOCKS = 32  # of four bits that `sum_lanes` sums in one loop: more compile slowly, then run so
VECTOR = 16  # floats that `sum_vectors` takes at a time; 8 is as fast, 24 and 32 are not
ONE_LOOP = 1024  # inputs that it takes; with more terms its loop is slower than the library
MADE_FLOAT = 2**19  # numbers of a kernel that `by_blocks` has as floats at a time
FLOAT32 = jnp.dtype(jnp.float32)


@partial(jax.jit, static_argnames="dtype")  # so that layers alike are traced once
def times_transposed(x_RI: jax.Array, kernel_OI: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x · kernelᵀ, [R, O] in `dtype`."""
    (R, I), floats = x_RI.shape, {x_RI.dtype, kernel_OI.dtype}
    if R <= MANY and floats == {FLOAT32} and _on_one_cpu():
        if R <= FEW and I % VECTOR == 0 and I <= ONE_LOOP:
            return sum_vectors(x_RI, kernel_OI).astype(dtype)
        if R > 1:
            return outputs_first(x_RI, kernel_OI).astype(dtype)
    if R == 1:  # the matrix-vector product it is
        return jnp.dot(kernel_OI, x_RI[0], preferred_element_type=dtype)[None]
    return jnp.einsum("RI,OI->RO", x_RI, kernel_OI, preferred_element_type=dtype)


def outputs_first(x_RI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """The library's product as kernel · xᵀ, by itself: fused with what follows, it is slower."""
    return jax.lax.optimization_barrier(kernel_OI @ x_RI.T).T


def sum_vectors(x_RI: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    """Sums of products, `VECTOR` adjacent inputs at a time; [R, O] in the dtype of both."""
    x_RI = jax.lax.optimization_barrier(x_RI)  # else each output computes it again
    terms_ORL = (
        kernel_OI[:, None, start : start + VECTOR] * x_RI[None, :, start : start + VECTOR]
        for start in range(0, x_RI.shape[1], VECTOR)
    )
    return _over_lanes(reduce(jnp.add, terms_ORL))


def _on_one_cpu() -> bool:
    """Whether this runs on a CPU, uncut: what lies on a mesh, the compiler cuts best by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and (mesh.empty or math.prod(mesh.axis_sizes) == 1)


@partial(jax.jit, static_argnames="dtype")
def times_quantized(x_RI: jax.Array, kernel: Quantized, dtype: jnp.dtype) -> jax.Array:
    """x · kernelᵀ, [R, O] in `dtype`, of a quantised kernel."""
    # Tied to x, which changes: else a decoding loop would keep floats made before it begins.
    kernel, x_RI = jax.lax.optimization_barrier((kernel, x_RI))
    return form_for(x_RI.shape[0], kernel)(x_RI, kernel).astype(dtype)


def form_for(rows: int, kernel: Quantized) -> Callable[[jax.Array, Quantized], jax.Array]:
    """The fastest form here for so many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    # What is cut over a mesh is left to the compiler, which knows how to cut a product.
    if platform() == "cpu" and (mesh.empty or math.prod(mesh.axis_sizes) == 1):
        return sum_lanes if rows <= FEW else by_blocks
    return multiply_and_reduce if rows <= FEW and kernel.lowest is not None else convert


def convert(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """The library's product with a kernel made x's dtype on the way; float32 [R, O]."""
    products = [
        times_transposed(x_RP, part.floats(x_RI.dtype), FLOAT32)
        for x_RP, part in zip(split(x_RI, kernel), parts(kernel))
    ]
    return _scaled(reduce(jnp.add, products), kernel)


def multiply_and_reduce(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """Sums of products of numbers that are never stored as floats; float32 [R, O]."""
    terms_ROP = [
        part.floats(FLOAT32)[None] * x_RP.astype(FLOAT32)[:, None]
        for x_RP, part in zip(split(x_RI, kernel), parts(kernel))
    ]
    return _scaled(reduce(jnp.add, terms_ROP).sum(axis=-1), kernel)


def by_blocks(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """`convert`, some outputs after the other: little of the kernel is ever float; [R, O]."""
    (R, I), O = x_RI.shape, kernel.whole.shape[0]
    wide_RI = x_RI.astype(FLOAT32)
    turns = math.ceil(O * I / MADE_FLOAT)
    size = math.ceil(O / turns)

    def turn(index: jax.Array, out_RO: jax.Array) -> jax.Array:
        start = jnp.minimum(index * size, O - size)  # the last block may begin in the one before
        block = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, size), kernel)
        return jax.lax.dynamic_update_slice_in_dim(out_RO, convert(wide_RI, block), start, axis=1)

    return jax.lax.fori_loop(0, turns, turn, jnp.zeros((R, O), FLOAT32))


def sum_lanes(x_RI: jax.Array, kernel: Quantized) -> jax.Array:
    """Sums of products over runs of inputs, lane by lane, then over the lanes; float32 [R, O].

    The first sum is written out, a term a run. The compiler makes one loop of it, over adjacent
    numbers and with its sums in registers; of a reduction it would make a scalar loop, or a call
    to a slower library.
    """
    runs = list(_runs(x_RI.astype(FLOAT32), kernel))
    most = len(runs) if kernel.lowest is None else BLOCKS
    sums_RO = [_sum_runs(runs[i : i + most]) for i in range(0, len(runs), most)]
    return reduce(jnp.add, sums_RO)


def _sum_runs(runs: list[tuple[jax.Array, Quantized]]) -> jax.Array:
    """The sum [R, O] of some runs' products."""
    terms_ORL = (
        part.floats(FLOAT32)[:, None] * x_RL[None]
        for x_RI, run in runs
        for x_RL, part in zip(split(x_RI, run), parts(run))
    )
    lanes_ORL = reduce(jnp.add, terms_ORL)
    if runs[0][1].lowest is None:
        lanes_ORL *= runs[0][1].scale.astype(FLOAT32)[:, None, None]
    return _over_lanes(lanes_ORL)


def _over_lanes(lanes_ORL: jax.Array) -> jax.Array:
    """The sums [R, O] over the lanes; as a product, since a reduction would be a scalar loop."""
    O, R, L = lanes_ORL.shape
    return jnp.dot(lanes_ORL.reshape(O * R, L), jnp.ones(L)).reshape(O, R).T


def _runs(x_RI: jax.Array, kernel: Quantized) -> Iterator[tuple[jax.Array, Quantized]]:
    """Adjacent inputs, and what of the kernel goes with them; of four bits a block at a time."""
    I = x_RI.shape[1]
    length = _run_length(I) if kernel.lowest is None else BLOCK
    for start in range(0, I, length):
        yield x_RI[:, start : start + length], kernel.inputs(start, length)


def _run_length(inputs: int) -> int:
    """Inputs to a run: a few vectors long, and a dozen runs or more where there can be."""
    for length in (128, 96, 64, 48):
        if inputs % length == 0 and inputs // length >= 12:
            return length
    return next((n for n in (32, *range(128, 15, -1)) if inputs % n == 0), inputs)


def _scaled(sums_RO: jax.Array, kernel: Quantized) -> jax.Array:
    """Sums of int8 products times the scales of their outputs; four bits were scaled before."""
    return sums_RO if kernel.lowest is not None else sums_RO * kernel.scale.astype(FLOAT32)[None]
