"""Attention block by block equals attention at once, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

from llama_jax.kernels import blockwise
from llama_jax.kernels.attention import attend, causal_mask, merge_heads_and_batch
from llama_jax.kernels.blockwise import blockwise_attention

pytestmark = pytest.mark.optimized

QUICK = {"xla_backend_optimization_level": 0}  # of the compiler
B, N, H = 3, 6, 4
LENGTHS = [5, 8, 16, 19]  # below, equal to, twice, and no multiple of a block of 8


@pytest.fixture
def blocks_of_8(monkeypatch):
    """Blocks so small that short sequences have several."""
    monkeypatch.setattr(blockwise, "SMALLEST_BLOCK", 8)


def arrays(T, K, dtype="float32"):
    """Queries, keys, values and the gradient of the output."""
    random = np.random.default_rng(T)
    return [jnp.asarray(random.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]


def at_once(q, k, v):
    """Plain attention, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    T = q.shape[1]
    mask = causal_mask(jnp.arange(T)[None], T)
    return attend(q, merge_heads_and_batch(k), merge_heads_and_batch(v), mask)


def value_and_gradients(attention, q, k, v, slope):
    def run(q, k, v, slope):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(slope.astype(out.dtype))

    results = jax.jit(run, compiler_options=QUICK)(q, k, v, slope)
    return [np.asarray(x, np.float32) for x in results]


@pytest.mark.parametrize(("T", "K"), slow_but([(19, 6)], [*((T, 2) for T in LENGTHS), (19, 6)]))
def test_blocks_equal_the_whole(blocks_of_8, T, K):
    given = arrays(T, K)
    results = value_and_gradients(blockwise_attention, *given)
    expected = value_and_gradients(at_once, *given)
    for name, result, right in zip(("out", "dq", "dk", "dv"), results, expected):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(blocks_of_8):
    given = arrays(19, 2, "bfloat16")
    results = value_and_gradients(blockwise_attention, *given)
    expected = value_and_gradients(at_once, *given)
    for name, result, right in zip(("out", "dq", "dk", "dv"), results, expected):
        error = np.abs(result - right).max() / np.abs(right).max()
        assert error < 2e-2, name


def test_results_keep_the_dtype(blocks_of_8):
    q, k, v, _ = arrays(5, 2, "bfloat16")
    out, pull = jax.eval_shape(lambda q, k, v: jax.vjp(blockwise_attention, q, k, v), q, k, v)
    assert {x.dtype for x in (out, *jax.eval_shape(lambda f, s: f(s), pull, out))} == {q.dtype}


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130, 1024, 1025, 4000])
def test_blocks_tile_the_sequence_and_are_few(T):
    blocks = blockwise._blocks(T)
    assert [t for start, end in blocks for t in range(start, end)] == list(range(T))
    assert len(blocks) <= blockwise.MOST_BLOCKS


def test_large_scores_do_not_overflow(blocks_of_8):
    q, k, v, slope = arrays(19, 2)
    results = value_and_gradients(blockwise_attention, 100 * q, 100 * k, v, slope)
    assert all(np.isfinite(result).all() for result in results)


@pytest.mark.parametrize("packed", [False, True])
def test_scores_above_the_diagonal_are_never_made(blocks_of_8, packed):
    """Of 16 blocks a side, (16 + 1) / 2 of each 16 are made: 0.53 of the arithmetic."""
    q, k, v, _ = (x[:1] for x in arrays(128, 2))
    segments = (jnp.ones((1, 128), jnp.int32),) if packed else ()
    counts = [
        jax.jit(f).lower(*given).compile(QUICK).cost_analysis()["flops"]
        for f, given in ((blockwise_attention, (q, k, v, *segments)), (at_once, (q, k, v)))
    ]
    assert counts[0] < 0.7 * counts[1]
