"""Attention against the oracle: masks, grouped heads, both ways of computing it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny_model import plain

from llama_jax.kernels.attention import KERNELS, attend, causal_mask, merge_heads_and_batch
from llama_jax.model.cache import KVCache, LayerCache
from llama_jax.model.layers import dropout
from llama_jax.model.positions import Positions

B, T, D, N, H = 5, 7, 24, 6, 4


def heads(K, dtype="float32", T=T):
    """Queries, keys and values, [B, T, heads, H]."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((B, T, n, H)), dtype) for n in (N, K, K)]


def attend_causally(q, k, v, drop=None):
    positions_BT = jnp.arange(q.shape[1])[None]
    mask = causal_mask(positions_BT, q.shape[1])
    return attend(q, merge_heads_and_batch(k), merge_heads_and_batch(v), mask, drop)


def test_a_query_attends_to_its_own_slot_and_those_before():
    mask_BTS = np.asarray(causal_mask(jnp.array([[0, 1], [3, 4]]), 5))
    expected = [["10000", "11000"], ["11110", "11111"]]
    spelled = [["".join("01"[int(may)] for may in row) for row in rows] for rows in mask_BTS]
    assert spelled == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("K", [1, 2, pytest.param(6, marks=pytest.mark.slow)])
def test_attend_agrees_with_the_oracle(K, dtype, tolerance):
    q, k, v = heads(K, dtype)
    out = attend_causally(q, k, v)
    assert out.dtype == dtype
    expected = [reference.attention(*row) for row in zip(*(np.asarray(x, "f4") for x in (q, k, v)))]
    np.testing.assert_allclose(out.astype("float32"), expected, rtol=tolerance, atol=tolerance)


def test_no_query_sees_what_the_mask_hides():
    q, k, v = heads(2)
    hidden = np.zeros((1, T, T), bool)
    hidden[:, :, 3] = True
    mask = jnp.asarray(np.tri(T, dtype=bool) & ~hidden | np.eye(T, dtype=bool))
    out = [attend(q, *map(merge_heads_and_batch, (k, x)), mask) for x in (v, v.at[:, 3].set(1e6))]
    others = [t for t in range(T) if t != 3]
    np.testing.assert_array_equal(out[0][:, others], out[1][:, others])
    assert (out[0][:, 3] != out[1][:, 3]).any()


def test_attention_weights_are_dropped_at_their_rate():
    q, k, _ = heads(6, T=40)
    q, rate = 0 * q, 0.25  # even weights, so that each output is a mean of kept ones
    out = attend_causally(
        q,
        k,
        jnp.ones_like(k),
        partial(dropout, rate=rate, key=jax.random.key(0), example_ids=jnp.arange, batch_dim=1),
    )
    kept = np.asarray(out)[:, -1, :, 0] * 40 * (1 - rate)  # of 40 weights in each row and head
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    deviation = np.sqrt(40 * rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - 40 * (1 - rate)) < 4 * deviation


@pytest.mark.parametrize("kernel", [None, "xla", "blockwise"])
def test_the_layer_agrees_with_the_oracle(tiny_model, kernel):
    layer = jax.tree.map(lambda array: array[1], tiny_model.blocks.attention)
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)), jnp.float32)
    positions = Positions.of(tiny_model.config, jnp.arange(T)[None])
    if kernel is None:
        cache = LayerCache(*[jnp.zeros((2 * B, 11, H))] * 2)
        whole = KVCache((cache,), jnp.zeros(B, jnp.int32))
        look = whole.attention(jnp.arange(T)[None])
    else:
        look, cache = lambda *given: (KERNELS[kernel](*given[:3]), None), None
    out, filled = jax.jit(lambda x, cache: layer(x, positions, look, cache))(x_BTD, cache)
    assert (filled is None) == (cache is None)
    weights = {name: array[1] for name, array in plain(tiny_model).items() if name[0] == "w"}
    oracle = partial(reference.attention_layer, layer=weights, theta=10000.0)
    expected = [oracle(row) for row in np.asarray(x_BTD)]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
