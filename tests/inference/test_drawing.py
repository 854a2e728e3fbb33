"""Masses and draws: proportions, frequencies, exactness in any batch; the most likely token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from frequencies import are_likely

from llama_jax.inference.sampler import TOTAL, draw, invert, masses, most_likely

pytestmark = pytest.mark.optimized

draw_by_weight = jax.jit(lambda weights_BV, keys_B: draw(masses(weights_BV), keys_B))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def weights(shape, seed=0, temperature=1.0):
    """Weights of normal logits, the largest of each row 1."""
    logits = np.random.default_rng(seed).normal(size=shape) / temperature
    return np.exp(logits - logits.max(axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("V", [1, 2, 3, 53, 32_000, 128_256, 2**18])
@pytest.mark.parametrize("kind", ["uniform", "steep", "one and tiny", "normal"])
def test_masses_are_integers_and_proportional(V, kind):
    made = {"uniform": np.ones(V), "steep": 0.5 ** np.arange(V), "one and tiny": np.full(V, 1e-7)}
    weights_V = weights(V) if kind == "normal" else made[kind].astype(np.float32)
    weights_V[0] = 1
    found = np.asarray(jax.jit(masses)(weights_V[None])[0])
    assert found.dtype == np.float32 and (found >= 0).all() and (found == np.round(found)).all()
    total = found.sum(dtype=np.float64)
    assert TOTAL / (2 + V**2 / 2**30) < total <= TOTAL + V / 2 + 1 <= 2**24
    shares = weights_V.astype(np.float64) / weights_V.sum(dtype=np.float64)
    rounding = 2**-24 * (1 + V**2 / 2**30)
    # Rounding moves each, and the change of the sum all.
    np.testing.assert_allclose(found / total, shares, rtol=V * rounding + 3e-7, atol=rounding)


@pytest.mark.parametrize("V", slow_but([700], [53, 256, 700]))
def test_tokens_are_as_frequent_as_they_are_likely(V):
    random = np.random.default_rng(V)
    weights_V = random.random(V) * (random.random(V) < 0.7)
    weights_V[7] = 1
    rows = np.broadcast_to(weights_V.astype(np.float32), (10_000, V))
    drawn = [draw_by_weight(rows, keys(10_000, seed)) for seed in range(10)]
    seen = np.bincount(np.concatenate(drawn), minlength=V)
    possible = weights_V > 0
    assert seen.sum() == 100_000 and not seen[~possible].any()
    expected = 100_000 * weights_V[possible] / weights_V.sum()
    assert are_likely(seen[possible], expected)


def test_a_draw_never_lands_on_a_weight_of_zero():
    weights_BV = np.zeros((5000, 515), np.float32)
    weights_BV[:, [255, 256, 514]] = [1e-30, 1, 1e-30]  # at the ends of blocks
    assert set(draw_by_weight(weights_BV, keys(5000)).tolist()) == {256}
    weights_BV[:, [255, 256, 514]] = [1, 0, 1]
    tokens = draw_by_weight(weights_BV, keys(5000))
    assert tokens.dtype == jnp.int32 and set(tokens.tolist()) == {255, 514}


@pytest.mark.parametrize(
    ("point", "index", "depth"), [(0, 1, 0), (1.5, 1, 1.5), (2, 3, 0), (4.75, 3, 2.75)]
)
def test_a_point_between_two_items_belongs_to_the_second(point, index, depth):
    found = invert(jnp.asarray([[0.0, 2, 0, 3, 0]]), jnp.asarray([point], jnp.float32))
    assert [leaf.tolist() for leaf in found] == [[index], [depth]]


def test_nan_gives_a_valid_token():
    assert 0 <= draw_by_weight(jnp.full((1, 53), jnp.nan), keys(1))[0] < 53


@pytest.mark.as_used
@pytest.mark.parametrize("V", [53, 300, 700])
def test_masses_do_not_depend_on_the_batch(V):
    # Float32 sums do, at these sizes, on CPU.
    weights_BV = weights((17, V), temperature=0.5)
    alone = np.concatenate([jax.jit(masses)(row[None]) for row in weights_BV])
    for B in (2, 3, 8, 16, 17):
        np.testing.assert_array_equal(jax.jit(masses)(weights_BV[:B]), alone[:B])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(53,), (6, 300), (2, 3, 700)])
def test_most_likely_equals_argmax(shape, dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)  # bfloat16 has ties
    found = jax.jit(most_likely)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))


@pytest.mark.parametrize("logits", [[1.0, 2, 2, 0], [-np.inf, 3, 3, -np.inf], [-5, 0, -0.0, -1]])
def test_ties_go_to_the_first_token(logits):
    assert most_likely(jnp.asarray([logits])).tolist() == [1]


def test_most_likely_of_nan_is_a_valid_token():
    assert 0 <= most_likely(jnp.full((1, 53), jnp.nan))[0] < 53
