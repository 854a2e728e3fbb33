"""Int4 storage: the bytes, the floats they stand for, and the operands of a matmul."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels.int4 import Quantized, pack, unpack

O, I, R = 5, 128, 3


def quantized(group_size, inputs=I, outputs=O):
    """A kernel of random integers: int8 for group size 0."""
    random = np.random.default_rng(0)
    if not group_size:
        integers = jnp.asarray(random.integers(-127, 128, (outputs, inputs)), jnp.int8)
        return Quantized(integers, jnp.asarray(random.random(outputs), jnp.float32))
    padded = -(-inputs // 64) * 64
    integers = pack(jnp.asarray(random.integers(0, 16, (outputs, padded))))
    scale, minimum = random.random((2, outputs, padded // group_size))
    return Quantized(
        integers, *(jnp.asarray(array, jnp.bfloat16) for array in (scale, -8 * minimum))
    )


def expected_floats(kernel, inputs=I):
    """The floats of a kernel, one column at a time, in float64."""
    scale = np.asarray(kernel.scale, np.float64)
    if kernel.minimum is None:
        return np.asarray(kernel.values, np.float64) * scale[:, None]
    minimum, bytes_ = np.asarray(kernel.minimum, np.float64), np.asarray(kernel.values)
    size = bytes_.shape[1] * 2 // scale.shape[1]
    found = np.zeros((len(bytes_), inputs))
    for i in range(inputs):
        block, place = divmod(i, 64)
        byte = bytes_[:, block * 32 + place % 32].astype(int)
        integers = byte // 16 if place >= 32 else byte % 16
        found[:, i] = integers * scale[:, i // size] + minimum[:, i // size]
    return found


def test_a_byte_holds_inputs_32_apart():
    integers = np.zeros((1, 128), int)
    integers[0, [0, 31, 32, 64, 100]] = [3, 7, 9, 15, 2]
    bytes_ = np.asarray(pack(jnp.asarray(integers)))
    expected = np.zeros((1, 64), np.uint8)
    expected[0, [0, 31, 32, 36]] = [3 + 16 * 9, 7, 15, 16 * 2]
    assert bytes_.dtype == np.uint8
    np.testing.assert_array_equal(bytes_, expected)


@pytest.mark.parametrize("inputs", [128, 100])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_a_kernel_is_dequantized(group_size, inputs):
    kernel = quantized(group_size, inputs)
    found = kernel.dequantize(inputs, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(found, expected_floats(kernel, inputs), rtol=1e-6, atol=1e-6)


def test_chosen_rows_are_dequantized():
    kernel, ids = quantized(32), jnp.asarray([[4, 1], [0, 4], [2, 2]])
    rows = Quantized(kernel.values[ids], kernel.scale[ids], kernel.minimum[ids])
    found = rows.dequantize(I, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(
        found, expected_floats(kernel)[np.asarray(ids)], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("inputs", [128, 100])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_unpacked_operands_give_the_product(group_size, inputs):
    kernel = quantized(group_size, inputs)
    x_RI = np.random.default_rng(1).standard_normal((R, inputs)).astype(np.float32)
    pairs = unpack(jnp.asarray(x_RI), kernel)
    product = sum(np.asarray(x) @ np.asarray(part.dequantize(jnp.float32)).T for x, part in pairs)
    if not group_size:
        product *= np.asarray(kernel.scale)
    np.testing.assert_allclose(
        product, x_RI @ expected_floats(kernel, inputs).T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_a_matrix_of_some_inputs(group_size):
    kernel = quantized(group_size, 192)
    np.testing.assert_allclose(
        expected_floats(kernel.inputs(64, 128), 128),
        expected_floats(kernel, 192)[:, 64:],
        rtol=1e-6,
    )
