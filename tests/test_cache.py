"""The cache puts rows where they belong and touches nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.cache import KVCache, LayerCache

K, S, H = 2, 11, 4


def test_an_empty_cache_has_room_and_no_tokens(tiny_config):
    cache = KVCache.empty(tiny_config, batch=5, slots=S)
    assert cache.slots == S
    assert len(cache.layers) == tiny_config.num_layers
    assert {array.shape for array in jax.tree.leaves(cache.layers)} == {(5, K, S, H)}
    assert {str(array.dtype) for array in jax.tree.leaves(cache.layers)} == {"float32"}
    assert cache.length_B.tolist() == [0] * 5


@pytest.mark.parametrize("starts", [[3], [0, 8, 4, 1, 5]])
@pytest.mark.parametrize("T", [1, 3])
def test_each_row_is_written_from_its_own_slot_on(starts, T):
    random = np.random.default_rng(0)
    B = len(starts)
    old = random.standard_normal((2, B, K, S, H), np.float32)
    new = random.standard_normal((2, B, T, K, H), np.float32)
    expected = old.copy()
    for kind, b, t in np.ndindex(2, B, T):
        expected[kind, b, :, starts[b] + t] = new[kind, b, t]
    cache = LayerCache(*map(jnp.asarray, old)).write(*map(jnp.asarray, new), jnp.array(starts))
    np.testing.assert_array_equal([cache.keys_BKSH, cache.values_BKSH], expected)


def test_writing_keeps_the_old_cache_and_its_dtype():
    old = LayerCache(*[jnp.zeros((2, K, S, H), "bfloat16")] * 2)
    new = old.write(*[jnp.ones((2, 1, K, H))] * 2, jnp.array([0, 1]))
    assert not old.keys_BKSH.any()
    assert new.keys_BKSH.any()
    assert new.keys_BKSH.dtype == "bfloat16"
