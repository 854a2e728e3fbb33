"""Bytes of two integers, by hand, and that parts of a matrix are the matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels.int4 import Quantized, floats, packed, parts, split

O, I, R = 5, 128, 3


def quantized(group_size, inputs=I, outputs=O):
    """A kernel of any integers: int8 for group size 0."""
    random = np.random.default_rng(0)
    if not group_size:
        whole = jnp.asarray(random.integers(-127, 128, (outputs, inputs)), jnp.int8)
        return Quantized(whole, jnp.asarray(random.random(outputs), jnp.float32))
    padded = -(-inputs // 64) * 64
    whole = packed(jnp.asarray(random.integers(0, 16, (outputs, padded))))
    scale, lowest = random.random((2, outputs, padded // group_size))
    return Quantized(whole, *(jnp.asarray(array, jnp.bfloat16) for array in (scale, -8 * lowest)))


def by_hand(kernel, inputs=I):
    """The numbers of a kernel, one at a time, in float64."""
    scale = np.asarray(kernel.scale, np.float64)
    if kernel.lowest is None:
        return np.asarray(kernel.whole, np.float64) * scale[:, None]
    lowest, bytes_ = np.asarray(kernel.lowest, np.float64), np.asarray(kernel.whole)
    size = bytes_.shape[1] * 2 // scale.shape[1]
    made = np.zeros((len(bytes_), inputs))
    for i in range(inputs):
        block, place = divmod(i, 64)
        byte = bytes_[:, block * 32 + place % 32].astype(int)
        whole = byte // 16 if place >= 32 else byte % 16
        made[:, i] = whole * scale[:, i // size] + lowest[:, i // size]
    return made


def test_a_byte_holds_inputs_32_apart():
    whole = np.zeros((1, 128), int)
    whole[0, [0, 31, 32, 64, 100]] = [3, 7, 9, 15, 2]
    bytes_ = np.asarray(packed(jnp.asarray(whole)))
    expected = np.zeros((1, 64), np.uint8)
    expected[0, [0, 31, 32, 36]] = [3 + 16 * 9, 7, 15, 16 * 2]
    assert bytes_.dtype == np.uint8
    np.testing.assert_array_equal(bytes_, expected)


@pytest.mark.parametrize("inputs", [128, 100])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_the_numbers_of_a_kernel(group_size, inputs):
    kernel = quantized(group_size, inputs)
    made = floats(kernel, inputs, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(made, by_hand(kernel, inputs), rtol=1e-6, atol=1e-6)


def test_the_numbers_of_chosen_rows():
    kernel, ids = quantized(32), jnp.asarray([[4, 1], [0, 4], [2, 2]])
    rows = Quantized(kernel.whole[ids], kernel.scale[ids], kernel.lowest[ids])
    made = floats(rows, I, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(made, by_hand(kernel)[np.asarray(ids)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inputs", [128, 100])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_parts_with_their_inputs_are_the_product(group_size, inputs):
    kernel = quantized(group_size, inputs)
    x_RI = np.random.default_rng(1).standard_normal((R, inputs)).astype(np.float32)
    pairs = zip(split(jnp.asarray(x_RI), kernel), parts(kernel))
    product = sum(np.asarray(x) @ np.asarray(part.floats(jnp.float32)).T for x, part in pairs)
    if not group_size:
        product *= np.asarray(kernel.scale)
    np.testing.assert_allclose(product, x_RI @ by_hand(kernel, inputs).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_a_matrix_of_some_inputs(group_size):
    kernel = quantized(group_size, 192)
    np.testing.assert_allclose(
        by_hand(kernel.inputs(64, 128), 128), by_hand(kernel, 192)[:, 64:], rtol=1e-6
    )
