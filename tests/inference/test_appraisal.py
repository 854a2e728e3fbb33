"""Scores and embeddings of many texts: as of each by itself, in few shapes, with little padding."""

import jax
import numpy as np
import pytest
from tiny_model import make_model

from llama_jax.inference import scoring as appraisal
from llama_jax.inference.scoring import embed_texts, embeddings, score_texts, token_logprobs
from llama_jax.model.unstacked import unstack
from llama_jax.text.tokenizer import train_tokenizer

STORIES = [f"Tim had {n} red sails. The sea was blue and the sun was warm." for n in range(50)]
SHORT = [f"Tim had {n} red sails." for n in range(20)]
LONG = "The sea was blue and the sun was warm. " * 6
MIXED = [LONG, *SHORT, "", LONG + "Tim", "The sea was blue and the sun was warm.", "Tim"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    tokenizer = train_tokenizer(STORIES, 290, tmp_path_factory.mktemp("tokenizer") / "t.model")
    vocab_size = tokenizer.vocab_size
    return unstack(make_model(vocab_size=vocab_size, num_layers=1, context_length=256)), tokenizer


def test_texts_together_are_as_each_alone_and_in_their_order(parts):
    scores, vectors = score_texts(*parts, MIXED), embed_texts(*parts, MIXED, True)
    assert len(scores) == len(vectors) == len(MIXED)
    for text, score, vector in zip(MIXED, scores, vectors):
        [alone] = score_texts(*parts, [text])
        assert score.token_ids == alone.token_ids
        np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=1e-5)
        np.testing.assert_allclose(vector, embed_texts(*parts, [text], True)[0], atol=1e-5)


def test_rows_that_are_nobodys_are_no_nan(parts):
    with jax.debug_nans(True):
        embed_texts(*parts, MIXED, True)


def test_no_texts_have_no_scores(parts):
    assert score_texts(*parts, []) == []
    assert embed_texts(*parts, [], True).shape == (0, 24)


def test_numbers_of_texts_share_programs(parts):
    token_logprobs.clear_cache(), embeddings.clear_cache()
    for count in range(1, 20):
        score_texts(*parts, SHORT[:count])
        embed_texts(*parts, SHORT[:count], False)
    assert token_logprobs._cache_size() == embeddings._cache_size() == 5, "1, 2, 4, 8, 16 rows"


def test_a_long_text_makes_no_short_one_longer(parts, monkeypatch):
    shapes = []

    def spy(model, tokens_BT):
        shapes.append(tokens_BT.shape)
        return token_logprobs(model, tokens_BT)

    monkeypatch.setattr(appraisal, "token_logprobs", spy)
    score_texts(*parts, [*SHORT[:8], LONG, *SHORT[8:]])
    assert shapes == [(16, 32), (4, 32), (1, 256)]
