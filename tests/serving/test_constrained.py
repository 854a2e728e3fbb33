"""Constrained sequences among others in the scheduler's batch."""

import pytest
import tiny_tokenizer
from tiny_model import make_model

from llama_jax.errors import UserError
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.transformer import unstack
from llama_jax.serving.scheduler import Scheduler
from llama_jax.text.huggingface import HuggingFaceTokenizer

SETTINGS = [
    {"regex": "[a-z]{2,9}( [0-9]+)?", "seed": 1},
    {"temperature": 0},
    {"json_schema": {"enum": ["red", "green", 12]}, "seed": 2, "logprobs": 2},
    {"seed": 3},
    {"grammar": 'start: "a" start | "b"', "temperature": 0.5, "logit_bias": {70: 2.0}},
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("constrained") / "tokenizer.json"
    content = tiny_tokenizer.library_of("llama-bpe").to_str().encode()
    model = unstack(make_model(vocab_size=330, num_layers=1, context_length=250))
    return Engine(model, tokenizer=HuggingFaceTokenizer(content, path))


@pytest.fixture(scope="module")
def scheduler(engine):
    scheduler = Scheduler(engine, slots=3)
    scheduler.start()
    yield scheduler
    scheduler.close()


def request_of(settings, row):
    params = SamplingParams(**{"max_tokens": 20, "temperature": 1.0} | settings)
    return Request(prompts=[[*range(10, 12 + row)]], params=[params], stop_ids=[2, 65])


def answer(deltas):
    """The ids of a sequence and why it ended."""
    deltas = list(deltas)
    return [token for delta in deltas for token in delta.ids], deltas[-1].finish_reason


@pytest.mark.slow
def test_a_constrained_sequence_gets_what_the_engine_gives_it(scheduler, engine):
    requests = [request_of(settings, row) for row, settings in enumerate(SETTINGS)] * 2
    together = [answer(deltas) for deltas in [scheduler.generate(each) for each in requests]]
    assert together == [answer(engine.generate(each)) for each in requests]
    assert scheduler.stats().compilations == 0


def test_a_constraint_that_cannot_be_followed_ends_its_own_sequence_only(scheduler, engine):
    other = request_of({}, 3)
    beside = scheduler.generate(other)
    with pytest.raises(UserError, match=r"no token .* continues the constrained text"):
        list(scheduler.generate(request_of({"regex": "((a{1000}){1000}){1000}"}, 1)))
    assert answer(beside) == answer(engine.generate(other))
    assert scheduler.stats().active == 0
