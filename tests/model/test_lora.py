"""Adapters: nothing at first, merged = attached = detached again, on stacked and other blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_model

from llama_jax.config import LoraConfig
from llama_jax.errors import UsageError
from llama_jax.model.lora import attach, detach, init_adapters, merge, scale_of, targets
from llama_jax.model.transformer import unstack
from llama_jax.quantization import quantize

TOKENS_BT = np.random.default_rng(0).integers(0, 53, (3, 11))
LORA = LoraConfig(rank=3, alpha=5.0, targets="linear,embedding,output")


@pytest.fixture(scope="module")
def model():
    return make_model(tied_embeddings=False)


@pytest.fixture(scope="module")
def adapters(model):
    """Adapters that change something."""
    made = init_adapters(model.config, LORA, jax.random.key(1))
    leaves, structure = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return jax.tree.unflatten(structure, noisy)


@jax.jit
def logits(model):
    return model(TOKENS_BT)[0]


def test_they_change_nothing_at_first(model):
    adapted = attach(model, init_adapters(model.config, LORA, jax.random.key(1)), LORA)
    np.testing.assert_array_equal(logits(adapted), logits(model))


@pytest.mark.slow
def test_merged_is_attached_on_every_layout(model, adapters):
    expected = logits(merge(model, adapters, LORA))
    assert np.abs(expected - logits(model)).max() > 0.1
    for base in (model, unstack(model)):
        np.testing.assert_allclose(logits(attach(base, adapters, LORA)), expected, atol=1e-5)


def test_detached_it_is_the_base(model, adapters):
    for base in (model, unstack(model)):
        before = jax.tree.structure(base)
        plain = detach(attach(base, adapters, LORA))
        assert jax.tree.structure(plain) == before == jax.tree.structure(base)
        np.testing.assert_array_equal(logits(plain), logits(base))


def test_a_quantized_base_is_adapted_and_refuses_to_be_merged(model, adapters):
    linear = {name: each for name, each in adapters.items() if name.startswith("blocks")}
    lora, small = dataclasses.replace(LORA, targets="linear"), quantize(model, "int8")
    change = logits(attach(small, linear, lora)) - logits(small)
    expected = logits(attach(model, linear, lora)) - logits(model)
    assert np.abs(change - expected).max() < 0.05 * np.abs(expected).max()
    with pytest.raises(UsageError, match="the base is quantized"):
        merge(small, linear, lora)


@pytest.mark.slow
def test_dropout_is_drawn_from_the_key(model, adapters):
    lora = dataclasses.replace(LORA, dropout=0.4)
    keys = (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    plain, first, same, other = (logits(attach(model, adapters, lora, key=key)) for key in keys)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - plain).max() > 1e-3 < np.abs(first - other).max()


def test_the_mean_over_dropout_is_no_dropout(model, adapters):
    """In the first linear layer alone, where what is dropped enters linearly."""
    lora = dataclasses.replace(LORA, dropout=0.3)
    x_BTD = jax.random.normal(jax.random.key(3), (3, 11, model.config.dim))
    layer = {"blocks.attention.wq": adapters["blocks.attention.wq"]}

    def queries(key):
        block = attach(model, layer, lora, key=key).blocks
        wq = jax.tree.map(lambda array: array[0], block.attention.wq)
        return wq(x_BTD)

    keys = jax.random.split(jax.random.key(4), 2000)
    mean = jax.jit(lambda: jax.lax.map(queries, keys).mean(axis=0))()
    expected = queries(None)
    assert jnp.abs(mean - expected).max() < 0.15 * jnp.abs(expected).max()


def test_rslora_scales_by_the_root_of_the_rank():
    assert scale_of(LoraConfig(rank=4, alpha=6.0)) == 1.5
    assert scale_of(LoraConfig(rank=4, alpha=6.0, rslora=True)) == 3.0


def test_targets_are_named_by_their_layers(model):
    def names(text):
        return [each.name for each in targets(model.config, LoraConfig(rank=2, targets=text))]

    assert names("wq, down") == ["blocks.attention.wq", "blocks.ffn.down"]
    assert names("output") == ["output"] and len(names("linear")) == 7
    with pytest.raises(UsageError, match="'q_proj', which matches nothing"):
        names("q_proj")
