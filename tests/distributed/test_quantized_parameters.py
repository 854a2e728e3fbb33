"""Quantized frozen parameters on meshes: eight devices compute what one does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import make_model

from llama_jax.config import MeshConfig
from llama_jax.distributed.fsdp import example_ids, gather, gradients_over_rows, lookup
from llama_jax.distributed.mesh import constrain, make_mesh, on_mesh, shardings
from llama_jax.model.execution import Execution
from llama_jax.quantization import quantize, restack

# Three groups of 64 inputs, and five in the feed-forward: no axis of two divides them.
SIZES = {"dim": 192, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 320, "vocab_size": 54}
TOKENS = np.random.default_rng(0).integers(0, 54, (8, 7)).astype(np.int32)
EXECUTION = Execution(constrain=constrain, lookup=lookup, example_ids=example_ids)


def step(trainable, frozen, tokens_BT, execution):
    """Sums of the last hidden states and their gradient by the scales of the first norms."""

    def loss(trainable):
        base = jax.tree.map(lambda leaf: leaf, frozen)
        base.blocks.attention_norm.scale[...] = trainable["scale"][...]
        hidden_BTD, _ = base.hidden(tokens_BT, execution=execution)
        outputs = jnp.sin(hidden_BTD)
        if not isinstance(base.output, nnx.Param):  # a quantized table; others are shards here
            outputs = outputs @ base.output_VD.T
        return jnp.sum(outputs[..., ::3])

    return jax.value_and_grad(loss)(trainable)


def run(base, mesh, execution):
    """The step on a mesh, or on one device."""
    trainable = {"scale": nnx.Param(base.blocks.attention_norm.scale[...] * 1.5, axes=("embed",))}
    if mesh is not None:
        trainable, base = (jax.device_put(x, shardings(x, mesh)) for x in (trainable, base))
    compute = jax.jit(partial(gradients_over_rows, partial(step, execution=execution)))
    with on_mesh(mesh):
        return compute(trainable, base, TOKENS)


@pytest.mark.parametrize(
    ("kind", "options", "remat"),
    [
        ("int8", {}, "none"),
        pytest.param("nf4", {"double_quantization": True}, "block", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_compute_what_one_does(kind, options, remat):
    model = make_model(**SIZES | {"num_layers": 2, "tied_embeddings": False})
    model.blocks = jax.tree.map(lambda array: 0.4 * array, model.blocks)  # else rounding grows
    base = (
        restack(quantize(model, "int8"))
        if kind == "int8"
        else quantize(model, kind, stacked=True, **options)
    )
    expected_sum, expected = run(base, None, Execution(remat=remat))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    execution = Execution(
        remat=remat, gather=gather, constrain=constrain, lookup=lookup, example_ids=example_ids
    )
    found_sum, found = run(base, mesh, execution)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_allclose(found_sum, expected_sum, rtol=1e-5)
    largest = np.abs(expected["scale"][...]).max()
    np.testing.assert_allclose(found["scale"][...], expected["scale"][...], atol=1e-5 * largest)


def test_quantized_arrays_are_gathered_as_they_are():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    key = jax.random.key(0)
    base = quantize(make_model(**SIZES), "nf4", stacked=True)
    wq, tree = base.blocks.attention.wq, {"base": base.blocks, "key": key}

    def gathered(_trainable, frozen, _batch):
        whole = gather(frozen, jnp.bfloat16)
        found = whole["base"].attention.wq
        assert found.kernel.dtype == np.uint8 and found.scale.dtype == np.float32
        assert found.kernel.shape == wq.kernel.shape and found.scale.shape == wq.scale.shape
        assert whole["base"].ffn_norm.scale.dtype == jnp.bfloat16
        assert whole["key"] is frozen["key"]
        return jnp.sum(found.scale[...].astype(jnp.float32)), {}

    places = shardings(tree, mesh)
    assert places["base"].attention.wq.kernel.spec[-1] == "fsdp"
    with jax.set_mesh(mesh):
        found, _ = jax.jit(partial(gradients_over_rows, gathered))(
            {}, jax.device_put(tree, places), TOKENS
        )
    np.testing.assert_allclose(found, 8 * wq.scale[...].sum(), rtol=1e-5)
