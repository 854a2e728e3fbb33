"""Scores and embeddings against the model's own logits and hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_model

from llama_jax.inference import scoring
from llama_jax.model.unstacked import unstack

B, T = 5, 23


@pytest.fixture(scope="module")
def model():
    return make_model(num_layers=2)


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 53, (B, T)), jnp.int32)


@pytest.mark.parametrize("positions", [4, 64])
@pytest.mark.parametrize("arrange", [unstack, lambda model: model])
def test_scores_are_log_probabilities_of_the_tokens(model, monkeypatch, positions, arrange):
    monkeypatch.setattr(scoring, "POSITIONS", positions)
    jax.clear_caches()
    told = scoring.token_logprobs(arrange(model), tokens())
    log_BTV = jax.nn.log_softmax(model(tokens())[0], axis=-1)
    expected = np.take_along_axis(np.asarray(log_BTV)[:, :-1], np.asarray(tokens())[:, 1:, None], 2)
    assert told.shape == (B, T - 1)
    np.testing.assert_allclose(told, expected[:, :, 0], rtol=1e-5, atol=1e-5)


def test_padding_changes_no_score(model):
    padded = jnp.pad(tokens(), ((0, 0), (0, 9)))
    told = scoring.token_logprobs(model, padded)[:, : T - 1]
    np.testing.assert_allclose(told, scoring.token_logprobs(model, tokens()), rtol=1e-5, atol=1e-5)


def test_an_embedding_is_the_mean_of_a_rows_own_states(model):
    length_B = jnp.array([1, T, 4, 7, 11])
    hidden = np.asarray(model.hidden(tokens())[0])
    means = np.stack([row[:n].mean(axis=0) for row, n in zip(hidden, length_B.tolist())])
    found = scoring.embeddings(model, tokens(), length_B, normalize=False)
    np.testing.assert_allclose(found, means, rtol=1e-5, atol=1e-5)
    unit = scoring.embeddings(model, tokens(), length_B)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(unit[1] / unit[1, 0], means[1] / means[1, 0], rtol=1e-4)
