"""The cache puts rows where they belong and touches nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

from llama_jax.kernels.splash import splash_with_log_sums
from llama_jax.model import cache as cache_module
from llama_jax.model.cache import KVCache, LayerCache, chunk_size

K, S, H = 2, 11, 4


def test_an_empty_cache_has_room_and_no_tokens(tiny_config):
    cache = KVCache.empty(tiny_config, batch=5, slots=S)
    assert cache.slots == S
    assert len(cache.layers) == tiny_config.num_layers
    assert {array.shape for array in jax.tree.leaves(cache.layers)} == {(K * 5, S, H)}
    assert {str(array.dtype) for array in jax.tree.leaves(cache.layers)} == {"float32"}
    assert cache.length_B.tolist() == [0] * 5


@pytest.mark.parametrize("starts", [[3], [0, 8, 4, 1, 5]])
@pytest.mark.parametrize("T", [1, 3])
def test_each_row_is_written_from_its_own_slot_on(starts, T):
    random = np.random.default_rng(0)
    B = len(starts)
    keys_RSH, values_RSH = random.standard_normal((2, K * B, S, H), np.float32)
    new_keys, new_values = random.standard_normal((2, B, T, K, H), np.float32)
    old = LayerCache(jnp.asarray(keys_RSH), jnp.asarray(values_RSH))
    cache = old.write(jnp.asarray(new_keys), jnp.asarray(new_values), jnp.array(starts))
    for b, t, k in np.ndindex(B, T, K):
        keys_RSH[k * B + b, starts[b] + t] = new_keys[b, t, k]
        values_RSH[k * B + b, starts[b] + t] = new_values[b, t, k]
    np.testing.assert_array_equal(cache.keys_RSH, keys_RSH)
    np.testing.assert_array_equal(cache.values_RSH, values_RSH)


def test_writing_keeps_the_old_cache_and_its_dtype():
    old = LayerCache(*[jnp.zeros((2 * K, S, H), "bfloat16")] * 2)
    new = old.write(*[jnp.ones((2, 1, K, H))] * 2, jnp.array([0, 1]))
    assert not old.keys_RSH.any()
    assert new.keys_RSH.any()
    assert {array.dtype for array in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}


def test_int8_holds_a_fourth_and_stays_within_half_a_step(tiny_config):
    B, T = 5, 3
    random = np.random.default_rng(0)
    keys, values = random.standard_normal((2, B, T, K, H), np.float32)
    keys[0, 0, 0] = 0.0  # a vector without a scale
    plain, small = (KVCache.empty(tiny_config, B, S, dtype) for dtype in ("", "int8"))
    at_B = jnp.array([0, 8, 4, 1, 5])
    plain_layer, small_layer = (
        cache.layers[0].write(jnp.asarray(keys), jnp.asarray(values), at_B)
        for cache in (plain, small)
    )
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(c.layers)) for c in (plain, small)]
    assert sizes[1] == sizes[0] * (H + 4) // (4 * H)  # a float32 scale for each H numbers
    for name in ("keys_RSH", "values_RSH"):
        exact, near = np.asarray(getattr(plain_layer, name)), getattr(small_layer, name)
        step = np.abs(exact).max(axis=-1, keepdims=True) / 127
        assert (np.abs(near - exact) <= 0.51 * step).all()
        assert near.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["", "int8"])
def test_more_slots_keep_what_is_there(tiny_config, dtype):
    cache = KVCache.empty(tiny_config, 1, 3, dtype)
    ones = jnp.ones((1, 3, K, H))
    cache = KVCache((cache.layers[0].write(ones, ones, jnp.array([0])),), jnp.array([3]))
    more = cache.with_slots(7)
    assert (more.slots, more.length_B.tolist()) == (7, [3])
    np.testing.assert_array_equal(more.layers[0].keys_RSH[:, :3], cache.layers[0].keys_RSH)
    assert not more.layers[0].values_RSH[:, 3:].any()


@pytest.mark.parametrize(
    ("T", "window", "dtype", "has_bias"),
    slow_but(
        [(2, 150, "int8", False), (70, 50, "", False)],
        [(1, 0, "", True), (2, 150, "int8", False), (70, 0, "", False), (70, 50, "", False)],
    ),
)
def test_attention_in_chunks_is_attention_at_once(
    tiny_config, monkeypatch, T, window, dtype, has_bias
):
    monkeypatch.setattr(cache_module, "CHUNK_ELEMENTS", 1)  # three chunks of 128 slots
    random, B, N, H = np.random.default_rng(0), 2, tiny_config.num_heads, tiny_config.head_size
    cache = KVCache.empty(tiny_config, B, 384, dtype)
    K = tiny_config.num_kv_heads
    before, new = (random.standard_normal((2, B, n, K, H), np.float32) for n in (384, T))
    layer = cache.layers[0].write(*map(jnp.asarray, before), jnp.int32(0))
    length_B = jnp.int32(141) if T > 2 else jnp.array([300, 7])
    cache = KVCache((layer,), length_B)
    q_BTNH = jnp.asarray(random.standard_normal((B, T, N, H)), jnp.float32)
    slopes_N = jnp.linspace(0.0, 0.1, N) if has_bias else None
    kernel = partial(splash_with_log_sums, interpret=True)
    arguments = (q_BTNH, *map(jnp.asarray, new), layer, None, slopes_N)
    (expected, _), (found, filled) = (
        jax.jit(cache.attention(cache.positions(T), window, among_new))(*arguments)
        for among_new in (None, kernel)
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    written = layer.write(*map(jnp.asarray, new), length_B)
    jax.tree.map(np.testing.assert_array_equal, filled, written)


@pytest.mark.parametrize("slots", [64, 96, 384, 1000, 2048])
def test_chunks_divide_the_slots(slots):
    sizes = [chunk_size(slots, R, M, 128) for R, M in ((32, 1), (512, 1), (512, 512))]
    assert all(slots % size == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
