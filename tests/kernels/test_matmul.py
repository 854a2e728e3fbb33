"""Matmul implementations: equal results, which one is chosen, and the memory it takes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow, slow_but
from test_int4 import expected_floats, quantized

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh, on_mesh
from llama_jax.kernels import matmul
from llama_jax.kernels.int4_tpu import multiply_int4
from llama_jax.kernels.matmul import (
    by_blocks,
    convert,
    implementation_for,
    multiply_and_reduce,
    sum_lanes,
    take_rows,
    times_quantized,
)

pytestmark = pytest.mark.optimized

IMPLEMENTATIONS = [sum_lanes, by_blocks, multiply_and_reduce, convert]
GROUPS = [0, 32, 64]
INT8, INT4 = quantized(0), quantized(32)
QUICK = {"xla_backend_optimization_level": 0}  # of the compiler


def quick(implementation):
    """An implementation, compiled quickly and anew."""
    return jax.jit(lambda *args: implementation(*args), compiler_options=QUICK)


def rows(count, inputs):
    return np.random.default_rng(1).standard_normal((count, inputs)).astype(np.float32)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [slow((13, 172)), (9, 37), slow((3, 768)), (4, 2176)]
)
@pytest.mark.parametrize("group_size", slow_but([0, 32], GROUPS))
def test_every_implementation_gives_the_product(outputs, inputs, group_size, monkeypatch):
    monkeypatch.setattr(matmul, "MADE_FLOAT", 2 * inputs)  # blocks of two outputs, or one
    kernel, x_RI = quantized(group_size, inputs, outputs), rows(3, inputs)
    expected = x_RI.astype(np.float64) @ expected_floats(kernel, inputs).T
    for implementation in IMPLEMENTATIONS:
        found = quick(implementation)(jnp.asarray(x_RI), kernel)
        assert (found.shape, found.dtype) == ((3, outputs), np.float32)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 2e-6, implementation.__name__


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("group_size", slow_but([0, 32], GROUPS))
def test_any_number_of_rows(count, group_size):
    kernel, x_RI = quantized(group_size), rows(count, 128)
    found = times_quantized(jnp.asarray(x_RI), kernel, matmul.FLOAT32)
    expected = x_RI @ expected_floats(kernel).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("group_size", slow_but([0, 32], GROUPS))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_rows(implementation, group_size):
    kernel, x_RI = quantized(group_size), jnp.asarray(rows(3, 128), jnp.bfloat16)
    expected = np.asarray(x_RI, np.float32) @ expected_floats(kernel).T
    found = quick(implementation)(x_RI, kernel)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
    assert times_quantized(x_RI, kernel, jnp.dtype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_which_quantized_implementation_is_chosen(monkeypatch):
    assert [implementation_for(count, INT8) for count in (1, 4, 5)] == [
        sum_lanes,
        sum_lanes,
        by_blocks,
    ]
    with jax.set_mesh(make_mesh(MeshConfig(tensor=8))):
        assert implementation_for(1, INT8) == implementation_for(9, INT4) == convert
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert implementation_for(1, INT8) == sum_lanes
    for backend in ("gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert implementation_for(1, INT8) == implementation_for(5, INT8) == convert
        few, more, many = (implementation_for(count, INT4) for count in (4, 5, 65))
        assert many == convert
        if backend == "tpu":
            assert few == more == multiply_int4
        else:
            assert (few, more) == (multiply_and_reduce, convert)


@pytest.mark.as_used
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("group_size", [0, 32])
def test_a_loop_holds_no_float_copy(count, group_size):
    O, I = 1024, 1024

    @jax.jit
    def loop(x_RI, kernel):
        def step(_, x_RI):
            return jnp.tanh(times_quantized(x_RI, kernel, matmul.FLOAT32))

        return jax.lax.fori_loop(0, 9, step, x_RI)

    kernel = quantized(group_size, I, O)
    made = loop.lower(jnp.asarray(rows(count, I)), kernel).compile().memory_analysis()
    assert made.temp_size_in_bytes < 0.6 * O * I * 4


@pytest.mark.parametrize("is_mesh", [False, True])
@pytest.mark.parametrize("group_size", slow_but([0, 32], GROUPS))
def test_gradients_by_the_rows_are_those_of_the_float_matmul(group_size, is_mesh, monkeypatch):
    outputs, inputs = 13, 172
    monkeypatch.setattr(matmul, "MADE_FLOAT", 5 * inputs)  # three blocks, the last overlapping
    kernel, x_RI, y_RO = quantized(group_size, inputs, outputs), rows(9, inputs), rows(9, outputs)
    expected = y_RO.astype(np.float64) @ expected_floats(kernel, inputs)
    mesh = make_mesh(MeshConfig(data=8)) if is_mesh else None
    for dtype, most in (("float32", 2e-6), ("bfloat16", 2e-2)):
        x, y = jnp.asarray(x_RI, dtype), jnp.asarray(y_RO)
        with on_mesh(mesh):
            _, back = jax.vjp(lambda x: times_quantized(x, kernel, matmul.FLOAT32), x)
            [found] = jax.jit(back)(y)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert (
            np.abs(np.asarray(found, np.float64) - expected).max() < most * np.abs(expected).max()
        )


SHAPES = re.compile(r"\b(f32|f64|bf16|f16|s8|u8|s32)\[([\d,]+)\]")


@pytest.mark.as_used
@pytest.mark.parametrize(
    ("group_size", "remat"), [(0, False), slow((0, True)), slow((32, False)), (32, True)]
)
def test_gradients_of_a_scan_copy_no_stacked_kernel(group_size, remat):
    L, heads, width, I, R = 6, 4, 32, 128, 8
    made = [quantized(group_size, I, heads * width) for _ in range(L)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *made)
    split = (L, heads, width)  # outputs of two dims, as queries have
    stacked = jax.tree.map(lambda array: array.reshape(*split, *array.shape[2:]), stacked)

    def run(bias_I, x_RI, stacked):
        def step(x_RI, kernel):
            return jnp.tanh(times_quantized(x_RI + bias_I, kernel, matmul.FLOAT32)), None

        return jax.lax.scan(jax.checkpoint(step) if remat else step, x_RI, stacked)[0].sum()

    gradient = jax.grad(run)
    bias_I, x_RI = jnp.zeros((1, I)), jnp.asarray(rows(R, I))
    for scan in jax.make_jaxpr(gradient)(bias_I, x_RI, stacked).eqns:
        if scan.primitive.name == "scan":  # residuals are outputs of the forward one
            assert all(value.aval.dtype == np.float32 for value in scan.outvars)
            assert all(value.aval.size <= L * R * I for value in scan.outvars)
    text = jax.jit(gradient).lower(bias_I, x_RI, stacked).compile().as_text()
    sizes = {
        math.prod(map(int, dims.split(",")))
        for dtype, dims in SHAPES.findall(text)
        if dtype not in ("s8", "u8")
    }
    assert max(sizes) < L * heads * width * I


@pytest.mark.parametrize("inputs", [32, 37, matmul.ONE_LOOP + matmul.VECTOR])
@pytest.mark.parametrize("count", [1, 3, matmul.FEW + 1, matmul.MANY + 1])
def test_floats_times_any_number_of_rows(count, inputs):
    kernel_OI, x_RI = rows(9, inputs), rows(count, inputs)
    found = matmul.times_transposed(jnp.asarray(x_RI), jnp.asarray(kernel_OI), matmul.FLOAT32)
    expected = x_RI.astype(np.float64) @ kernel_OI.T.astype(np.float64)
    assert (found.shape, found.dtype) == ((count, 9), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("count", "inputs", "dtype", "expected"),
    [
        (1, 64, "float32", "sum_vectors"),
        (matmul.FEW, 64, "float32", "sum_vectors"),
        (matmul.FEW, 72, "float32", "outputs_first"),
        (matmul.MANY, 64, "float32", "outputs_first"),
        (matmul.MANY + 1, 64, "float32", None),
        (1, 72, "float32", None),
        (1, matmul.ONE_LOOP + matmul.VECTOR, "float32", None),
        (3, 64, "bfloat16", None),
    ],
)
def test_which_float_implementation_is_chosen(monkeypatch, count, inputs, dtype, expected):
    matmul.times_transposed.clear_cache()  # else what another test traced would be taken
    called = []
    for name in ("sum_vectors", "outputs_first"):
        take = getattr(matmul, name)
        monkeypatch.setattr(
            matmul, name, lambda *given, take=take, name=name: called.append(name) or take(*given)
        )
    x_RI, kernel_OI = (jnp.asarray(rows(n, inputs), dtype) for n in (count, 9))
    matmul.times_transposed(x_RI, kernel_OI, matmul.FLOAT32)
    assert called == ([expected] if expected else [])


def test_equal_shapes_are_traced_once(monkeypatch):
    """A model has dozens; each traced anew, the loop of 110M took a second longer to load."""
    matmul.times_transposed.clear_cache()
    traced, take = [], matmul.sum_vectors
    monkeypatch.setattr(matmul, "sum_vectors", lambda *given: traced.append(given) or take(*given))

    @jax.jit
    def thrice(x_RI, *kernels):
        return [matmul.times_transposed(x_RI, kernel, matmul.FLOAT32) for kernel in kernels]

    thrice(jnp.ones((1, 80)), *[jnp.ones((9, 80))] * 3)
    assert len(traced) == 1


def test_floats_on_a_mesh_are_left_to_the_compiler(monkeypatch):
    x_RI, kernel_OI = jnp.ones((1, 64)), jnp.ones((9, 64))
    matmul.times_transposed(x_RI, kernel_OI, matmul.FLOAT32)  # what is traced here stays here
    monkeypatch.setattr(matmul, "sum_vectors", None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        matmul.times_transposed(x_RI, kernel_OI, matmul.FLOAT32)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("V", [96, 91])  # whole tiles of a TPU, and not
def test_rows_of_a_table_are_the_same_on_every_platform(monkeypatch, shape, V):
    table = np.random.default_rng(0).integers(-127, 128, (V, 40)).astype(np.int8)
    ids = np.random.default_rng(1).integers(0, V, shape)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = jax.jit(take_rows)(jnp.asarray(table), jnp.asarray(ids))
    np.testing.assert_array_equal(found, table[ids])
