"""Quantized models to train on top of: stacked blocks, lists of blocks, and their gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from tiny_model import make_model

from llama_jax.model.execution import Execution
from llama_jax.model.parameters import named_leaves
from llama_jax.model.transformer import Block, unstack
from llama_jax.quantization import quantize, restack

SIZES = {"dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "vocab_size": 56}
TOKENS = np.random.default_rng(0).integers(0, 56, (2, 9)).astype(np.int32)


def model_of(**changes):
    return make_model(**SIZES | {"num_layers": 3, "tied_embeddings": False} | changes)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("int8", {}, marks=pytest.mark.slow),
        pytest.param("int4", {"group_size": 64}, marks=pytest.mark.slow),
        pytest.param("nf4", {}, marks=pytest.mark.slow),
        ("nf4", {"double_quantization": True}),
    ],
)
def test_stacked_blocks_equal_those_quantized_one_by_one(kind, options):
    model = model_of(attention_bias=True)
    stacked, listed = (
        quantize(model, kind, stacked=True, **options),
        quantize(model, kind, **options),
    )
    for layer in range(2):  # the last one may be int8 in the list
        expected = named_leaves(listed.blocks[layer])
        found = {name: leaf[layer] for name, leaf in named_leaves(stacked.blocks).items()}
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            assert found[name].dtype == leaf.dtype
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert stacked.embedding is not model.embedding
    np.testing.assert_array_equal(stacked.output[...], model.output[...])
    logits, again = (each(jnp.asarray(TOKENS))[0] for each in (stacked, unstack(stacked)))
    np.testing.assert_allclose(logits, again, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_structure_are_stacked_and_others_stay_a_list():
    model = model_of()
    found = restack(quantize(model, "int8"))
    expected = quantize(model, "int8", stacked=True).blocks
    assert jax.tree.structure(found.blocks) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found.blocks, expected)
    mixed = quantize(model_of(num_layers=12), "int4")
    assert mixed.blocks[-1].ffn.up.kernel.dtype != mixed.blocks[0].ffn.up.kernel.dtype
    assert restack(mixed) is mixed
    assert restack(model) is model
    again = restack(unstack(model))
    assert isinstance(again.blocks, Block)
    # Compiled: what runs one operation after the other is rounded in other places.
    logits, expected = (jax.jit(lambda m: m(TOKENS)[0])(each) for each in (again, unstack(model)))
    np.testing.assert_array_equal(logits, expected)


def gradient(model, remat):
    """The gradient of a sum of hidden states by the input embedding, with dropout."""
    execution = Execution(remat=remat)

    @jax.jit
    def of(table_VD, model):
        def loss(table_VD):
            base = jax.tree.map(lambda leaf: leaf, model)
            base.embedding[...] = table_VD
            key = jax.random.key(0)
            hidden_BTD, _ = base.hidden(TOKENS, dropout_key=key, execution=execution)
            return jnp.sum(jnp.sin(hidden_BTD))

        return jax.grad(loss)(table_VD)

    return of(model.embedding[...], model)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_lists_of_blocks_train_as_stacked_ones(remat):
    stacked = quantize(model_of(dropout=0.2), "nf4", stacked=True)
    expected = gradient(stacked, "none")
    for model in (stacked, unstack(stacked)):
        found = gradient(model, remat)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_list_of_blocks_keeps_only_their_inputs_with_remat():
    model = unstack(quantize(model_of(), "int8", stacked=True))
    kept = {}
    for remat in ("none", "block"):

        def loss(table_VD, remat=remat):
            base = jax.tree.map(lambda leaf: leaf, model)
            base.embedding[...] = table_VD
            return base.hidden(TOKENS, execution=Execution(remat=remat))[0].sum()

        _, back = jax.vjp(loss, model.embedding[...])
        kept[remat] = sum(x.size for x in jax.tree.leaves(back) if x.dtype == np.float32)
    assert kept["block"] < 0.7 * kept["none"]


SHAPES = re.compile(r"\b(f32|f64|bf16|f16)\[([\d,]+)\]")


@pytest.mark.parametrize("remat", ["none", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", slow_but(["int8"], ["int8", "int4", "nf4"]))
def test_training_makes_no_floats_of_all_layers_of_a_matrix(kind, remat):
    base = quantize(model_of(num_layers=8, hidden_dim=256), kind, stacked=True)

    def loss(scale_D, base):
        base = jax.tree.map(lambda leaf: leaf, base)
        base.norm.scale[...] = scale_D
        base.embedding[...] = base.embedding[...] * scale_D[None]
        return base.hidden(TOKENS, execution=Execution(remat=remat))[0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(base.norm.scale[...], base)
    sizes = [
        math.prod(map(int, dims.split(",")))
        for _, dims in SHAPES.findall(lowered.compile().as_text())
    ]
    assert max(sizes) < 8 * 64 * 256
