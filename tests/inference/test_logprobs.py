"""Log-probabilities against probabilities worked by hand and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference.decode import top_logprobs

found_by = jax.jit(top_logprobs, static_argnums=2)


def test_by_hand():
    logits = np.log(np.asarray([[0.1, 0.5, 0.15, 0.25], [0.7, 0.1, 0.1, 0.1]], np.float32)) + 3
    found = found_by(logits, jnp.asarray([2, 0]), 2)
    np.testing.assert_allclose(np.exp(found.token), [0.15, 0.7], rtol=1e-6)
    assert found.top_ids.tolist() == [[1, 3], [0, 1]]  # of equals the lower id
    np.testing.assert_allclose(np.exp(found.top), [[0.5, 0.25], [0.7, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 2)])
@pytest.mark.parametrize("n", [0, 1, 53])
def test_against_float64(shape, n):
    random = np.random.default_rng(n)
    logits = (9 * random.normal(size=(*shape, 53)) + 40).astype(np.float32)
    tokens = random.integers(0, 53, shape)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    found = found_by(logits, tokens, n)
    expected = np.take_along_axis(exact, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.token, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.top, -np.sort(-exact)[..., :n], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-logits)[..., :n])
    assert found.top_ids.shape == (*shape, n) and found.top_ids.dtype == jnp.int32


def test_half_precision_is_not_summed_in():
    logits = jnp.zeros((1, 512), jnp.bfloat16)
    assert found_by(logits, jnp.asarray([3]), 0).token[0] == pytest.approx(-np.log(512))
