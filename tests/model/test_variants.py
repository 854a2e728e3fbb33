"""What some Llamas have and others have not: biases and a sliding window, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import slow_but
from tiny_model import make_model, plain

from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.parameters import count_parameters, matrices, named_leaves
from llama_jax.model.transformer import unstack
from llama_jax.quantization import abstract_quantized, model_nbytes, quantize
from llama_jax.quantization.surgery import QuantizationConfig, allocate, quantized_nbytes
from llama_jax.training.optimizer import is_matrix

B, T, V = 2, 9, 53
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))
BIASES = {"attention_bias": True, "mlp_bias": True}
VARIANTS = {"biases": BIASES, "window": {"sliding_window": 4}}
VARIANTS["both"] = BIASES | {"sliding_window": 3}


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(["both"], VARIANTS))
def test_logits_agree_with_the_oracle_by_every_way(name):
    model = make_model(**VARIANTS[name])
    window = model.config.sliding_window
    expected = np.stack([reference.forward(plain(model), row, window=window) for row in TOKENS_BT])
    without = np.stack(
        [reference.forward(plain(make_model(weights=plain(model))), row) for row in TOKENS_BT]
    )
    assert np.abs(expected - without).max() > 0.1
    close(jax.jit(lambda m: m(TOKENS_BT)[0])(model), expected)
    execution = Execution(attention=blockwise_attention)
    close(jax.jit(lambda m: m(TOKENS_BT, execution=execution)[0])(model), expected)
    run = jax.jit(lambda m, tokens, cache: m(tokens, cache))
    cache, parts = KVCache.empty(model.config, B, 12), []
    for part_BT in (TOKENS_BT[:, :5], TOKENS_BT[:, 5:6], TOKENS_BT[:, 6:]):
        logits_BTV, cache = run(unstack(model), part_BT, cache)
        parts.append(logits_BTV)
    close(np.concatenate(parts, axis=1), expected)


def test_a_window_does_not_reach_into_another_document():
    model = make_model(sliding_window=3)
    segments_BT = np.array([[1] * 4 + [2] * 5, [1] * 7 + [2] * 2], np.int32)

    @jax.jit
    def logits(model):
        return model.logits(model.hidden(TOKENS_BT, segments_BT=jnp.asarray(segments_BT))[0])

    logits_BTV = logits(model)
    for b, split in enumerate((4, 7)):
        for part in (slice(0, split), slice(split, T)):
            expected = reference.forward(plain(model), TOKENS_BT[b, part], window=3)
            close(logits_BTV[b, part], expected)


def test_biases_are_counted_and_are_no_matrices():
    biased, usual = make_model(**BIASES), make_model()
    D, N, K, H, F, L = 24, 6, 2, 4, 40, 3
    more = L * (N * H + 2 * K * H + D + 2 * F + D)
    assert count_parameters(biased.config) == count_parameters(usual.config) + more
    assert matrices(biased.config) == matrices(usual.config)
    decays = named_leaves(is_matrix(biased))
    assert sum(name.endswith(".bias") for name in decays) == 7
    assert all(flag == name.endswith(("kernel", "embedding")) for name, flag in decays.items())


@pytest.mark.parametrize("kind", slow_but(["int8"], ["int8", "int4"]))
def test_quantized_models_keep_their_biases(kind):
    model = make_model(**BIASES)
    small = quantize(model, kind)
    np.testing.assert_array_equal(
        small.blocks[1].attention.wq.bias[...], model.blocks.attention.wq.bias[...][1]
    )
    logits, expected = (jax.jit(lambda m: m(TOKENS_BT)[0])(m) for m in (small, model))
    assert np.linalg.norm(logits - expected) < 0.2 * np.linalg.norm(expected)
    sizes = allocate(model.config, QuantizationConfig(kind))
    assert model_nbytes(abstract_quantized(model.config, kind)) == quantized_nbytes(
        model.config, sizes
    )
