"""Scores and embeddings: against the model's own, and of many texts against some alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_model

from llama_jax.inference.scoring import (
    batches,
    embed_sequences,
    embeddings,
    score_sequences,
    split_windows,
    token_logprobs,
)
from llama_jax.model.transformer import unstack
from llama_jax.text.sentencepiece import train_tokenizer

B, T = 5, 23
STORIES = [f"Tim had {n} red sails. The sea was blue and the sun was warm." for n in range(50)]
SHORT = [f"Tim had {n} red sails." for n in range(20)]
LONG = "The sea was blue and the sun was warm. " * 6
MIXED = [LONG, *SHORT, "", LONG + "Tim", "The sea was blue and the sun was warm.", "Tim"]


@pytest.fixture(scope="module")
def model():
    return make_model(num_layers=2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model, and a function from texts to sequences of token ids."""
    tokenizer = train_tokenizer(STORIES, 290, tmp_path_factory.mktemp("tokenizer") / "t.model")
    vocab_size = tokenizer.vocab_size
    model = unstack(make_model(vocab_size=vocab_size, num_layers=1, context_length=256))
    return model, lambda texts: [tokenizer.encode(text, bos=True) for text in texts]


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 53, (B, T)), jnp.int32)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("layout", [unstack, lambda model: model])
def test_scores_are_log_probabilities_of_the_tokens(model, chunk, layout):
    found, are_top = token_logprobs(layout(model), tokens(), chunk=chunk)
    log_BTV = jax.nn.log_softmax(model(tokens())[0], axis=-1)
    expected = np.take_along_axis(np.asarray(log_BTV)[:, :-1], np.asarray(tokens())[:, 1:, None], 2)
    assert found.shape == (B, T - 1)
    np.testing.assert_allclose(found, expected[:, :, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(are_top, log_BTV[:, :-1].argmax(axis=-1) == tokens()[:, 1:])


def test_padding_changes_no_score(model):
    padded = jnp.pad(tokens(), ((0, 0), (0, 9)))
    found = token_logprobs(model, padded)[0][:, : T - 1]
    np.testing.assert_allclose(found, token_logprobs(model, tokens())[0], rtol=1e-5, atol=1e-5)


def test_an_embedding_is_the_mean_of_a_sequences_own_states(model):
    length_B = jnp.array([1, T, 4, 7, 11])
    hidden = np.asarray(model.hidden(tokens())[0])
    means = np.stack([row[:n].mean(axis=0) for row, n in zip(hidden, length_B.tolist())])
    found = embeddings(model, tokens(), length_B, normalize=False)
    np.testing.assert_allclose(found, means, rtol=1e-5, atol=1e-5)
    unit = embeddings(model, tokens(), length_B)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(unit[1] / unit[1, 0], means[1] / means[1, 0], rtol=1e-4)


def test_texts_together_equal_each_alone_in_their_order(parts):
    model, encode = parts
    scores, vectors = (
        score_sequences(model, encode(MIXED)),
        embed_sequences(model, encode(MIXED), True),
    )
    assert len(scores) == len(vectors) == len(MIXED)
    for text, score, vector in list(zip(MIXED, scores, vectors))[::6]:
        [alone] = score_sequences(model, encode([text]))
        assert score.token_ids == alone.token_ids
        np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=1e-5)
        np.testing.assert_allclose(
            vector, embed_sequences(model, encode([text]), True)[0], atol=1e-5
        )


@pytest.mark.parametrize("length", [32, 33, 48, 49, 90])
def test_long_sequences_are_scored_in_windows(model, length):
    """Each token given the window in which it comes first; by hand, one window at a time."""
    ids = np.random.default_rng(1).integers(0, 53, length).tolist()
    [score] = score_sequences(model, [ids])
    expected = []
    for start in [*range(0, length - 32, 16), length - 32]:
        window = jnp.asarray([ids[start : start + 32]])
        expected += token_logprobs(model, window)[0][0, len(expected) - start :].tolist()
    assert (score.token_ids, len(score.logprobs)) == (tuple(ids), length - 1)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert score.total == pytest.approx(sum(expected))


@pytest.mark.parametrize("stride", [1, 5, 7])
@pytest.mark.parametrize("part", [3, 40])
def test_windows_score_each_token_once_with_the_context_that_the_stride_leaves(stride, part):
    for length in range(1, 30):
        ids = list(range(length))
        parts = [ids[start : start + part] for start in range(0, length, part)]
        windows = list(split_windows(parts, 8, stride))
        assert [i for ids, known in windows for i in ids[known:]] == ids[1:]
        starts = [0] if length <= 8 else [*range(0, length - 8, stride), length - 8]
        assert [list(window.ids) for window in windows] == [ids[s : s + 8] for s in starts]
        assert all(known >= 8 - stride for _, known in windows[1:])


def test_filler_sequences_are_not_nan(parts):
    model, encode = parts
    with jax.debug_nans(True):
        embed_sequences(model, encode(MIXED), True)


def test_no_texts_have_no_scores(parts):
    model, _ = parts
    assert score_sequences(model, []) == []
    assert embed_sequences(model, [], True).shape == (0, 24)


def test_different_numbers_of_texts_share_programs(parts):
    model, encode = parts
    rows = [encode(SHORT[:count]) for count in range(1, 20)]
    shapes = {batch.tokens_BT.shape for each in rows for batch in batches(model, each)}
    assert {rows for rows, _ in shapes} == {1, 2, 4, 8, 16} and len(shapes) == 5


def test_a_long_text_does_not_pad_short_ones(parts):
    model, encode = parts
    rows = encode([*SHORT[:8], LONG, *SHORT[8:]])
    found = [batch.tokens_BT.shape for batch in batches(model, rows)]
    assert found == [(16, 32), (4, 32), (1, 256)]
