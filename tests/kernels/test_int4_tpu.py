"""The Pallas kernel for int4 on a TPU, interpreted."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from test_int4 import expected_floats, quantized

from llama_jax.kernels.int4_tpu import BYTES, OUTPUTS, multiply_int4
from llama_jax.kernels.matmul import convert

SIZES = [  # rows, outputs, inputs: less than a tile, whole tiles, and more of either
    (1, 13, 172),
    (3, OUTPUTS, 2 * BYTES),
    (9, OUTPUTS + 40, 2 * BYTES + 192),
]


@pytest.mark.parametrize("group_size", slow_but([32], [32, 64]))
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SIZES)
def test_products_are_nearer_to_exact_ones_than_those_of_bfloat16(
    rows, outputs, inputs, group_size
):
    kernel = quantized(group_size, inputs, outputs)
    drawn = np.random.default_rng(1).standard_normal((rows, inputs))
    x_RI = jnp.asarray(drawn, jnp.bfloat16)
    expected = np.asarray(x_RI, np.float64) @ expected_floats(kernel, inputs).T
    found = multiply_int4(x_RI, kernel, interpret=True)
    assert (found.shape, found.dtype) == ((rows, outputs), np.float32)
    error = np.abs(found - expected).max()
    assert error < 4e-3 * np.abs(expected).max()  # weights keep 8 bits
    assert error < np.abs(convert(x_RI, kernel) - expected).max()
