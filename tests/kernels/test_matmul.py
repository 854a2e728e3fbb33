"""Every form of a quantised product is the product; which is chosen; what it costs in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_int4 import expected_floats, quantized

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.kernels import matmul as products
from llama_jax.kernels.matmul import (
    by_blocks,
    convert,
    implementation_for,
    multiply_and_reduce,
    sum_lanes,
    times_quantized,
)

pytestmark = pytest.mark.optimized

FORMS = [sum_lanes, by_blocks, multiply_and_reduce, convert]
INT8, INT4 = quantized(0), quantized(32)
QUICK = {"xla_backend_optimization_level": 0}  # of the compiler


def quick(form):
    """A form, compiled in little time and afresh."""
    return jax.jit(lambda *given: form(*given), compiler_options=QUICK)


def rows(count, inputs):
    return np.random.default_rng(1).standard_normal((count, inputs)).astype(np.float32)


@pytest.mark.parametrize(("outputs", "inputs"), [(13, 172), (9, 37), (3, 768), (4, 2176)])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_every_form_is_the_product(outputs, inputs, group_size, monkeypatch):
    monkeypatch.setattr(products, "MADE_FLOAT", 2 * inputs)  # blocks of two outputs, or one
    kernel, x_RI = quantized(group_size, inputs, outputs), rows(3, inputs)
    expected = x_RI.astype(np.float64) @ expected_floats(kernel, inputs).T
    for form in FORMS:
        found = quick(form)(jnp.asarray(x_RI), kernel)
        assert (found.shape, found.dtype) == ((3, outputs), np.float32)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 2e-6, form.__name__


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_any_number_of_rows(count, group_size):
    kernel, x_RI = quantized(group_size), rows(count, 128)
    found = times_quantized(jnp.asarray(x_RI), kernel, products.FLOAT32)
    expected = x_RI @ expected_floats(kernel).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_rows(form, group_size):
    kernel, x_RI = quantized(group_size), jnp.asarray(rows(3, 128), jnp.bfloat16)
    expected = np.asarray(x_RI, np.float32) @ expected_floats(kernel).T
    found = quick(form)(x_RI, kernel)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
    assert times_quantized(x_RI, kernel, jnp.dtype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_which_form_is_chosen(monkeypatch):
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
        assert (
            implementation_for(1, INT8)
            == implementation_for(5, INT8)
            == implementation_for(5, INT4)
            == convert
        )
        assert implementation_for(4, INT4) == multiply_and_reduce


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("group_size", [0, 32])
def test_a_loop_holds_no_float_copy(count, group_size):
    O, I = 1024, 1024

    @jax.jit
    def loop(x_RI, kernel):
        def step(_, x_RI):
            return jnp.tanh(times_quantized(x_RI, kernel, products.FLOAT32))

        return jax.lax.fori_loop(0, 9, step, x_RI)

    kernel = quantized(group_size, I, O)
    made = loop.lower(jnp.asarray(rows(count, I)), kernel).compile().memory_analysis()
    assert made.temp_size_in_bytes < 0.6 * O * I * 4


def test_gradients_reach_the_rows():
    kernel, x_RI = quantized(0), jnp.asarray(rows(9, 128))
    slope_RI = jax.grad(lambda x: times_quantized(x, kernel, products.FLOAT32).sum())(x_RI)
    expected = np.broadcast_to(expected_floats(kernel).sum(axis=0), slope_RI.shape)
    np.testing.assert_allclose(slope_RI, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("inputs", [32, 37, products.ONE_LOOP + products.VECTOR])
@pytest.mark.parametrize("count", [1, 3, products.FEW + 1, products.MANY + 1])
def test_floats_times_any_number_of_rows(count, inputs):
    kernel_OI, x_RI = rows(9, inputs), rows(count, inputs)
    found = products.times_transposed(jnp.asarray(x_RI), jnp.asarray(kernel_OI), products.FLOAT32)
    expected = x_RI.astype(np.float64) @ kernel_OI.T.astype(np.float64)
    assert (found.shape, found.dtype) == ((count, 9), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("count", "inputs", "dtype", "form"),
    [
        (1, 64, "float32", "sum_vectors"),
        (products.FEW, 64, "float32", "sum_vectors"),
        (products.FEW, 72, "float32", "outputs_first"),
        (products.MANY, 64, "float32", "outputs_first"),
        (products.MANY + 1, 64, "float32", None),
        (1, 72, "float32", None),
        (1, products.ONE_LOOP + products.VECTOR, "float32", None),
        (3, 64, "bfloat16", None),
    ],
)
def test_which_form_of_floats_is_chosen(monkeypatch, count, inputs, dtype, form):
    products.times_transposed.clear_cache()  # else what another test traced would be taken
    called = []
    for name in ("sum_vectors", "outputs_first"):
        take = getattr(products, name)
        monkeypatch.setattr(
            products, name, lambda *given, take=take, name=name: called.append(name) or take(*given)
        )
    x_RI, kernel_OI = (jnp.asarray(rows(n, inputs), dtype) for n in (count, 9))
    products.times_transposed(x_RI, kernel_OI, products.FLOAT32)
    assert called == ([form] if form else [])


def test_products_of_a_kind_are_traced_once(monkeypatch):
    """A model has dozens; each traced anew, the loop of 110M took a second longer to load."""
    products.times_transposed.clear_cache()
    traced, take = [], products.sum_vectors
    monkeypatch.setattr(
        products, "sum_vectors", lambda *given: traced.append(given) or take(*given)
    )

    @jax.jit
    def thrice(x_RI, *kernels):
        return [products.times_transposed(x_RI, kernel, products.FLOAT32) for kernel in kernels]

    thrice(jnp.ones((1, 80)), *[jnp.ones((9, 80))] * 3)
    assert len(traced) == 1


def test_floats_on_a_mesh_are_left_to_the_compiler(monkeypatch):
    x_RI, kernel_OI = jnp.ones((1, 64)), jnp.ones((9, 64))
    products.times_transposed(x_RI, kernel_OI, products.FLOAT32)  # what is traced here stays here
    monkeypatch.setattr(products, "sum_vectors", None)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        products.times_transposed(x_RI, kernel_OI, products.FLOAT32)
