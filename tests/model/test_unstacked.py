"""The decode layout: the same parameters and products; `test_transformer` compares logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import make_model

from llama_jax.model.layers import Linear, OutputsFirstLinear
from llama_jax.model.transformer import unstack

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1, 1), (5, 7)])
@pytest.mark.parametrize(("inputs", "outputs"), [((24,), (6, 4)), ((6, 4), (20,))])
def test_outputs_first_gives_the_same_product(inputs, outputs, rows, dtype):
    axes = ("embed", "heads", "head_dim")
    linear = Linear(inputs, outputs, axes, std=0.2, rngs=nnx.Rngs(0))
    outputs_first = OutputsFirstLinear(linear)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((*rows, *inputs)), dtype)
    assert outputs_first.kernel.shape == outputs + inputs
    assert outputs_first.kernel.axes == axes[len(inputs) :] + axes[: len(inputs)]
    assert outputs_first(x).dtype == dtype
    out, expected = (np.asarray(f(x), np.float32) for f in (outputs_first, linear))
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_unstacking_leaves_the_model_unchanged(tiny_model):
    before = jax.tree.structure(tiny_model)
    unstacked = unstack(tiny_model)
    assert jax.tree.structure(tiny_model) == before
    assert unstacked.embedding[...] is tiny_model.embedding[...]
    assert unstack(unstacked) is unstacked


def test_consumed_model_gives_the_same_arrays_and_is_freed():
    model = make_model(num_layers=2)
    expected = jax.tree.map(np.asarray, unstack(model))
    stacked = jax.tree.leaves(model.blocks)
    found = unstack(model, consume=True)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found), expected)
    assert all(array.is_deleted() for array in stacked)


@pytest.mark.parametrize(
    ("platform", "wq", "down"),
    [
        ("cpu", OutputsFirstLinear, OutputsFirstLinear),
        ("gpu", Linear, Linear),
        ("tpu", OutputsFirstLinear, Linear),
    ],
)
def test_which_matrices_are_stored_outputs_first(tiny_model, monkeypatch, platform, wq, down):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for block in unstack(tiny_model).blocks:
        assert (type(block.attention.wq), type(block.ffn.down)) == (wq, down)
