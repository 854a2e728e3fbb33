"""Models of small integers: what they hold, how near they stay, and that they run everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_model
from tiny_weights import built

from llama_jax.config import MeshConfig
from llama_jax.errors import UsageError
from llama_jax.formats import llama2c
from llama_jax.generation import generate
from llama_jax.model import unstack
from llama_jax.names import named_leaves
from llama_jax.quantization import abstract_quantized, held_bytes, quantize
from llama_jax.sampling import make_sampler
from llama_jax.scoring import token_logprobs
from llama_jax.sharding import make_mesh, shardings
from llama_jax.tokenizer import Tokenizer

SIZES = {"dim": 192, "hidden_dim": 320, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2}
KINDS = {"int8": 0.5, "int4": 5.0}  # per cent by which perplexity may rise


@pytest.fixture(scope="module")
def model():
    return make_model(**SIZES, vocab_size=53)


@pytest.mark.parametrize(("kind", "held"), [("int8", 0.30), ("int4", 0.20)])
def test_memory_falls(model, kind, held):
    assert held_bytes(quantize(model, kind)) <= held * held_bytes(model)


# Of numbers from N(0, 1), int8 has steps of about 3 / 127 and a group of 32 in four bits of about
# 4.1 / 15; rounding errs by a step / √12. Products of many terms err by the same fraction.
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.010), ("int4", 0.10)])
@pytest.mark.parametrize("rows", [1, 5])
def test_products_stay_as_near_as_the_steps_allow(model, kind, error, rows):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, 1, 192)), jnp.float32)
    exact, near = (m.blocks[1].ffn.gate(x) for m in (unstack(model), quantize(model, kind)))
    assert near.dtype == jnp.float32
    deviation = float(jnp.sqrt(jnp.mean((near - exact) ** 2)) / exact.std())
    assert error / 4 < deviation < error


@pytest.mark.parametrize("kind", KINDS)
def test_a_stacked_and_a_listed_model_give_the_same(model, kind):
    one, other = (named_leaves(quantize(m, kind)) for m in (model, unstack(model)))
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_its_description_has_its_shapes(model, kind):
    shapes = {
        name: (leaf.shape, leaf.dtype)
        for name, leaf in named_leaves(abstract_quantized(model.config, kind)).items()
    }
    made = named_leaves(quantize(model, kind))
    assert shapes == {name: (leaf.shape, leaf.dtype) for name, leaf in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_is_one_device(model, kind):
    small, prompts = quantize(model, kind), [[5, 6], [1, 2, 3]]
    options = {"max_tokens": 8, "seeds": [0, 0]}
    greedy = make_sampler(temperature=0)
    alone = [chunk.rows for chunk in generate(small, prompts, greedy, **options)]
    mesh = make_mesh(MeshConfig(data=2, tensor=2, fsdp=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(small, shardings(small, mesh))
        assert [chunk.rows for chunk in generate(placed, prompts, greedy, **options)] == alone


@pytest.mark.parametrize(("kind", "allowed"), KINDS.items())
def test_perplexity_of_a_trained_model_hardly_rises(shared_data, kind, allowed):
    exact = built(llama2c.read(shared_data / "stories260K.bin"))
    tokenizer = Tokenizer(shared_data / "tok512.model")
    stories = (shared_data / "tinystories.txt").read_text().split("<|endoftext|>")[-48:]
    ids = [tokenizer.encode(story.strip(), bos=True, eos=False)[:128] for story in stories]
    tokens = jnp.asarray([row for row in ids if len(row) == 128], jnp.int32)
    assert len(tokens) > 30
    nll = [-float(token_logprobs(m, tokens).mean()) for m in (exact, quantize(exact, kind))]
    assert 100 * (np.exp(nll[1] - nll[0]) - 1) < allowed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int2",), "quantize='int2' is unknown; expected 'int8' or 'int4'"),
        (("int4", 48), "group_size=48 is not supported; expected 32 or 64"),
    ],
)
def test_what_is_not_there_is_refused(model, arguments, message):
    with pytest.raises(UsageError, match=message):
        quantize(model, *arguments)


def test_twice_is_refused(model):
    with pytest.raises(UsageError, match="quantised already"):
        quantize(quantize(model, "int8"), "int8")
