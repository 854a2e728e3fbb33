"""llama2.c's stories260K, a model trained elsewhere, gives the same text here."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_weights import built

from llama_jax.formats.llama2c import model as llama2c
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.transformer import unstack
from llama_jax.text.tokenizer import load_tokenizer

LILY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    " One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def weights(shared_data):
    return llama2c.read(shared_data / "stories260K.bin")


@pytest.fixture(scope="module")
def model(weights):
    return built(weights)


def test_its_shape(weights):
    config = weights.config
    assert (config.dim, config.num_layers, config.ffn_dim) == (64, 5, 172)
    assert (config.num_heads, config.num_kv_heads) == (8, 4)
    assert (config.vocab_size, config.context_length) == (512, 512)
    assert config.tied_embeddings


def test_the_most_likely_first_tokens(model):
    logits_V = model(jnp.asarray([[1]]))[0][0, -1]
    best = np.argsort(-logits_V)[:5]
    assert best.tolist() == [403, 385, 410, 317, 407]
    expected = [17.0235, 15.4062, 13.1083, 12.7692, 12.4181]
    np.testing.assert_allclose(logits_V[best], expected, atol=1e-3)


def test_the_greedy_story(model, shared_data):
    tokenizer = load_tokenizer(shared_data / "tok512.model")
    request = Request(
        prompts=[[tokenizer.bos_id]],
        params=[SamplingParams(temperature=0, max_tokens=80)],
        stop_ids=[tokenizer.bos_id],
    )
    ids = [token for delta in Engine(unstack(model)).generate(request) for token in delta.ids]
    assert tokenizer.decode(ids).startswith(LILY)
