"""The chunked loss equals the plain one, and never holds the logits of all tokens."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.training import loss
from llama_jax.training.loss import summed_loss, summed_nll

D = 24
V = 53  # pieces, which 2 and 8 devices cannot share out
EVEN_V = 56  # which they can
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def arrays(B, T, dtype="float32", V=V):
    """Hidden states, output matrix, targets and weights, some of which are 0."""
    random = np.random.default_rng(T)
    hidden_BTD = jnp.asarray(random.standard_normal((B, T, D)), dtype)
    output_VD = jnp.asarray(random.standard_normal((V, D)), jnp.float32)
    targets_BT = jnp.asarray(random.integers(0, V, (B, T)))
    weights_BT = jnp.asarray(random.integers(0, 3, (B, T)), jnp.float32)
    return hidden_BTD, output_VD, targets_BT, weights_BT


def plain_nll(hidden_BTD, output_VD, targets_BT, weights_BT):
    """All logits at once, in float32."""
    logits_BTV = hidden_BTD.astype(jnp.float32) @ output_VD.T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)
    return -(chosen[..., 0] * weights_BT).sum()


def plain_loss(hidden_BTD, output_VD, targets_BT, weights_BT, z_loss):
    """The same with the square of log Σ exp(logits), as the formula has it."""
    logits_BTV = hidden_BTD.astype(jnp.float32) @ output_VD.T
    penalty_BT = z_loss * jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1)) ** 2
    nll = plain_nll(hidden_BTD, output_VD, targets_BT, weights_BT)
    return nll + (penalty_BT * weights_BT).sum()


def value_and_slopes(nll, given):
    value, slopes = jax.jit(jax.value_and_grad(nll, argnums=(0, 1)))(*given)
    return [np.asarray(x, np.float32) for x in (value, *slopes)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("B", "T", "chunk_tokens"),
    [(3, 6, 6), (3, 7, 6), (3, 7, 512)],  # chunks of 2, 1 and 7 positions
)
def test_chunks_equal_the_whole(monkeypatch, B, T, chunk_tokens, dtype):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk_tokens)
    given = arrays(B, T, dtype)
    for got, right in zip(value_and_slopes(summed_nll, given), value_and_slopes(plain_nll, given)):
        assert np.abs(got - right).max() <= TOLERANCE[dtype] * np.abs(right).max()


def test_the_value_is_the_same_with_and_without_gradients():
    given = arrays(3, 6)
    np.testing.assert_allclose(summed_nll(*given), value_and_slopes(summed_nll, given)[0], 1e-6)


def test_the_sum_agrees_with_the_oracle():
    hidden_BTD, output_VD, targets_BT, weights_BT = map(np.asarray, arrays(3, 6))
    logits_BTV = hidden_BTD.astype(np.float64) @ output_VD.T
    rows = zip(logits_BTV, targets_BT, weights_BT)
    expected = sum(reference.nll(logits, targets) @ weights for logits, targets, weights in rows)
    np.testing.assert_allclose(summed_nll(*arrays(3, 6)), expected, rtol=1e-5)


def test_tokens_of_weight_zero_are_ignored():
    hidden_BTD, output_VD, targets_BT, weights_BT = arrays(3, 6)
    ignored_BT = weights_BT == 0
    assert 0 < ignored_BT.sum() < ignored_BT.size
    other = jnp.where(ignored_BT, (targets_BT + 1) % V, targets_BT)
    wild_BTD = jnp.where(ignored_BT[..., None], 7 * hidden_BTD, hidden_BTD)
    first = value_and_slopes(summed_nll, (hidden_BTD, output_VD, targets_BT, weights_BT))
    second = value_and_slopes(summed_nll, (wild_BTD, output_VD, other, weights_BT))
    for got, right in zip(second, first):
        np.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-6)
    assert not first[1][np.asarray(ignored_BT)].any()


def test_gradients_scale_with_what_the_sum_is_multiplied_by():
    given = arrays(3, 6)
    once = value_and_slopes(summed_nll, given)
    thrice = value_and_slopes(lambda *given: 3 * summed_nll(*given), given)
    for got, right in zip(thrice, once):
        np.testing.assert_allclose(got, 3 * right, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden_BTD, *others = arrays(3, 6)
    results = value_and_slopes(summed_nll, (1000 * hidden_BTD, *others))
    assert all(np.isfinite(result).all() for result in results)


@pytest.mark.parametrize("z_loss", [pytest.param(1e-2, marks=pytest.mark.slow), 0.7])
def test_the_z_loss_and_its_gradients_are_those_of_the_formula(z_loss):
    given = arrays(3, 7)
    got = value_and_slopes(lambda *given: summed_loss(*given, z_loss)[0], given)
    right = value_and_slopes(lambda *given: plain_loss(*given, z_loss), given)
    without = value_and_slopes(plain_nll, given)
    for ours, theirs, nll in zip(got, right, without):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
        assert np.abs(theirs - nll).max() > 1e-3 * np.abs(theirs).max()


def test_what_is_reported_knows_no_z_loss():
    given = arrays(3, 7)
    loss, nll = summed_loss(*given, 0.7)
    np.testing.assert_allclose(nll, plain_nll(*given), rtol=1e-5)
    assert loss > nll + 1
    slopes = jax.grad(lambda *given: summed_loss(*given, 0.7)[1])(*given)
    assert not np.asarray(slopes).any()


@pytest.mark.parametrize(
    ("sizes", "V", "B"),
    [
        ((1, 1, 8), EVEN_V, 6),
        ((1, 1, 8), V, 6),  # every device does the whole vocabulary
        pytest.param((2, 2, 2), EVEN_V, 8, marks=pytest.mark.slow),  # rows cut as well
        ((1, 8, 1), V, 6),  # 6 rows on 8 devices: every device does them all
    ],
    ids=str,
)
def test_cut_over_devices_it_is_the_same(monkeypatch, sizes, V, B):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)
    given = arrays(B, 7, V=V)

    def whole(*given):
        return summed_loss(*given, 0.1)[0]

    right = value_and_slopes(whole, given)
    with jax.set_mesh(make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes))))):
        got = value_and_slopes(whole, given)
    for ours, theirs in zip(got, right):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def largest_buffer(nll, B, T):
    """Elements of the largest array in the compiled loss and gradients."""
    given = jax.eval_shape(lambda: arrays(B, T))
    text = jax.jit(jax.value_and_grad(nll, argnums=(0, 1))).lower(*given).compile().as_text()
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text))


def test_the_logits_of_all_tokens_never_exist_at_once():
    B, T = 4, 512
    assert largest_buffer(summed_nll, B, T) < B * T * V
    assert largest_buffer(plain_nll, B, T) >= B * T * V  # what the measure sees otherwise


def test_no_dtype_is_promoted_by_chance():
    with jax.numpy_dtype_promotion("strict"):
        for dtype in TOLERANCE:
            jax.eval_shape(jax.grad(summed_nll, argnums=(0, 1)), *arrays(3, 6, dtype))
