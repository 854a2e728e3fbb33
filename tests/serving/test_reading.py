"""Texts that a scheduler only reads: what the library finds, nothing compiled, nobody held up."""

from concurrent.futures import CancelledError

import numpy as np
import pytest
from cases import slow_but
from schedulers import started, wait_until
from tiny_model import make_model

from llama_jax.errors import UserError
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.inference.scoring import embed_sequences, score_sequences
from llama_jax.model.transformer import unstack
from llama_jax.serving.reading import EmbeddingReading, ScoreReading
from llama_jax.serving.scheduler import QueueFullError, Scheduler

CONTEXT, SLOTS, WAITING = 350, 2, 5
random = np.random.default_rng(5)
# A token, a chunk and what is next to it, several chunks, and all of the context.
LENGTHS = (1, 15, 16, 17, 90, 257, CONTEXT)
TEXTS = [random.integers(0, 53, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def engine():
    return Engine(unstack(make_model(num_layers=1, context_length=CONTEXT)))


@pytest.fixture(scope="module")
def scheduler(engine):
    with started(engine, slots=SLOTS, max_waiting=WAITING) as scheduler:
        yield scheduler


def read(scheduler, reading):
    scheduler.read(reading)
    return reading.future.result(timeout=60)


def test_embeddings_are_those_of_the_library(scheduler, engine):
    expected = embed_sequences(engine.model, TEXTS, normalize=True)
    np.testing.assert_allclose(read(scheduler, EmbeddingReading(TEXTS)), expected, atol=1e-6)
    assert scheduler.stats().compilations == 0


@pytest.mark.parametrize("top", slow_but([3], [0, 3]))
def test_scores_are_those_of_the_library(scheduler, engine, top):
    expected = score_sequences(engine.model, TEXTS, top)
    for found, score in zip(read(scheduler, ScoreReading(TEXTS, top)), expected, strict=True):
        assert found.token_ids == score.token_ids
        np.testing.assert_allclose(found.logprobs, score.logprobs, atol=1e-5)
        np.testing.assert_allclose(found.total, score.total, rtol=1e-5)
        np.testing.assert_allclose(found.perplexity, score.perplexity, rtol=1e-5)
        ids = [[each.id for each in place] for place in score.top]
        assert [[each.id for each in place] for place in found.top] == ids
    assert scheduler.stats().compilations == 0


@pytest.mark.parametrize("make", [EmbeddingReading, lambda texts: ScoreReading(texts, 2)])
def test_positions_that_come_again_count_once(engine, make):
    text = TEXTS[4]
    hidden_BTD, _ = engine.model.hidden(np.asarray([text]))
    whole, parted = make([text]), make([text])
    assert whole.add(engine.model, hidden_BTD, 0)
    assert not parted.add(engine.model, hidden_BTD[:, :60], 0)
    assert parted.add(engine.model, hidden_BTD[:, 40:], 40)
    (one,), (other,) = whole.future.result(), parted.future.result()
    np.testing.assert_allclose(
        *(getattr(found, "logprobs", found) for found in (one, other)), atol=1e-5
    )


def test_prompts_are_answered_while_texts_are_read(scheduler, engine):
    """A reading of many texts waits for its turn before each; its neighbours get their own ids."""
    params = [SamplingParams(temperature=0, max_tokens=9)] * 4
    request = Request(prompts=TEXTS[2:6], params=params)
    reading = EmbeddingReading(TEXTS * 30)
    scheduler.read(reading)
    found, expected = [[[], [], [], []] for _ in "ab"]
    for delta in scheduler.generate(request):
        found[delta.index] += delta.ids
    assert not reading.future.done()
    for delta in engine.generate(request):
        expected[delta.index] += delta.ids
    assert found == expected
    vectors = np.asarray(reading.future.result(timeout=120)).reshape(30, len(TEXTS), -1)
    assert (vectors == vectors[:1]).all()
    wait_until(lambda: scheduler.stats().active == 0)


def test_a_prompt_goes_on_from_a_text_that_was_read(scheduler):
    [long] = [text for text in TEXTS if len(text) == 90]
    read(scheduler, ScoreReading([long], 0))
    before = scheduler.stats().reused_tokens
    params = [SamplingParams(temperature=0, max_tokens=1)]
    assert list(scheduler.generate(Request(prompts=[[*long, 5]], params=params)))
    assert scheduler.stats().reused_tokens - before == len(long)


def test_a_cancelled_reading_ends(scheduler):
    reading = EmbeddingReading(TEXTS * 1000)
    scheduler.read(reading)
    wait_until(lambda: scheduler.stats().active == 1)
    assert reading.future.cancel()
    wait_until(lambda: scheduler.stats().active == scheduler.stats().waiting == 0)
    with pytest.raises(CancelledError):
        reading.future.result()


@pytest.mark.parametrize(("text", "length"), [([], 0), ([1] * (CONTEXT + 1), CONTEXT + 1)])
def test_a_text_of_no_length_or_beyond_the_context_is_refused(scheduler, text, length):
    with pytest.raises(UserError, match=f"a text has {length} tokens; expected 1 to {CONTEXT}"):
        scheduler.read(ScoreReading([[3, 4], text], 0))


def test_readings_wait_in_the_queue_and_end_with_the_scheduler(engine):
    scheduler = Scheduler(engine, slots=SLOTS, max_waiting=WAITING)
    readings = [EmbeddingReading(TEXTS) for _ in range(SLOTS + WAITING)]
    for reading in readings:  # it has not started, so that nothing leaves the queue
        scheduler.read(reading)
    with pytest.raises(QueueFullError):
        scheduler.read(EmbeddingReading(TEXTS))
    scheduler.close(drain=True)
    scheduler.start()
    for reading in readings:
        assert len(reading.future.result(timeout=60)) == len(TEXTS)


def test_what_is_not_read_when_the_scheduler_ends_gets_an_error(engine):
    scheduler = Scheduler(engine, slots=SLOTS, max_waiting=WAITING)
    reading = EmbeddingReading(TEXTS * 1000)
    scheduler.read(reading)
    scheduler.start()
    scheduler.close()
    with pytest.raises(UserError, match="the server is stopping"):
        reading.future.result(timeout=60)
