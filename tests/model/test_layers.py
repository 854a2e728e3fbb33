"""Matrices, norms and dropout against the oracle and against arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from llama_jax.model.layers import Linear, RMSNorm, dropout, parameter

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_agrees_with_the_oracle(dtype):
    norm = RMSNorm(24, 1e-5)
    norm.scale[...] = 1 + 0.3 * normal(24, seed=1)
    x_BTD = jnp.asarray(5 * normal(5, 7, 24), dtype)
    out_BTD = norm(x_BTD)
    expected = reference.norm(np.asarray(x_BTD), np.asarray(norm.scale[...]), 1e-5)
    assert out_BTD.dtype == dtype
    np.testing.assert_allclose(out_BTD.astype("float32"), expected, rtol=TOLERANCE[dtype])


def test_norm_adds_eps_to_the_mean_square():
    tiny = jnp.full((1, 1, 24), 1e-3)
    np.testing.assert_allclose(RMSNorm(24, 1e-6)(tiny), 1e-3 / np.sqrt(2e-6), rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("inputs", "outputs", "equation"),
    [
        ((24,), (40,), "BTD,DF->BTF"),
        ((24,), (6, 4), "BTD,DNH->BTNH"),
        ((6, 4), (24,), "BTNH,NHD->BTD"),
    ],
)
def test_linear_contracts_one_group_of_dims(inputs, outputs, equation, dtype):
    axes = ("embed",) * (len(inputs) + len(outputs))
    linear = Linear(inputs, outputs, axes, std=0.2, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(5, 7, *inputs), dtype)
    out = linear(x)
    assert linear.kernel[...].dtype == jnp.float32
    assert out.dtype == dtype
    kernel = np.asarray(linear.kernel[...].astype(dtype), np.float64)
    expected = np.einsum(equation, np.asarray(x, np.float64), kernel)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(out.astype("float32"), expected, rtol=tolerance, atol=tolerance)


def test_a_parameter_has_its_axes_and_its_deviation():
    param = parameter((53, 240), ("vocab", "embed"), 0.5, nnx.Rngs(0))
    values = np.asarray(param[...])
    assert param.axes == ("vocab", "embed")
    assert values.dtype == np.float32
    error = 4 / np.sqrt(values.size)  # four deviations of the estimate
    assert abs(values.mean()) < 0.5 * error
    assert abs(values.std() - 0.5) < 0.5 * error


def test_dropout_without_a_key_or_a_rate_is_the_identity():
    x = jnp.ones((5, 7))
    assert dropout(x, 0.5, None, jnp.arange) is x
    assert dropout(x, 0.0, jax.random.key(0), jnp.arange) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_fraction_and_keeps_the_mean(rate):
    n = 40_000
    out = np.asarray(dropout(jnp.full(n, 3.0), rate, jax.random.key(1), jnp.arange))
    error = 4 * np.sqrt(rate * (1 - rate) / n)
    assert abs((out == 0).mean() - rate) < error
    np.testing.assert_allclose(out[out != 0], 3 / (1 - rate), rtol=1e-6)
    assert abs(out.mean() - 3) < 3 * error / (1 - rate)


def test_dropout_is_decided_by_its_key():
    x = jnp.ones(1000)
    once, again, other = (dropout(x, 0.5, jax.random.key(seed), jnp.arange) for seed in (0, 0, 1))
    assert (once == again).all()
    assert (once != other).any()


def test_dropout_keeps_the_dtype():
    assert dropout(jnp.ones(9, "bfloat16"), 0.5, jax.random.key(0), jnp.arange).dtype == "bfloat16"
