"""Quantized models against their float originals: logits, memory, storage, perplexity."""

import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow, slow_but
from flax import nnx
from tiny_model import make_model
from tiny_run import fit, make_config, make_tokens, quick_runs
from tiny_weights import built

from llama_jax.checkpoints.load import load
from llama_jax.config import MeshConfig, ModelConfig
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.mesh import make_mesh, shardings
from llama_jax.errors import UsageError
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.inference.decode import ON_MESH
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.inference.scoring import token_logprobs
from llama_jax.model.layers import Linear, OutputsFirstLinear
from llama_jax.model.parameters import count_parameters, named_leaves
from llama_jax.model.transformer import Llama, unstack
from llama_jax.quantization import (
    QuantizationConfig,
    abstract_quantized,
    model_nbytes,
    quantize,
    shard_matmuls,
)
from llama_jax.quantization.modules import QuantizedLinear, QuantizedMatrix
from llama_jax.quantization.rounding import to_int4, to_int8
from llama_jax.quantization.surgery import allocate, quantized_nbytes
from llama_jax.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.optimized

FLOAT32 = jnp.dtype(jnp.float32)
SHAPE = (40, 192)  # of a matrix; one, since each is compiled for anew
SIZES = {"dim": 128, "num_heads": 8, "num_kv_heads": 2, "hidden_dim": 192, "vocab_size": 56}
WAYS = [("int8", 32), ("int4", 32), ("int4", 64)]
SHARE = {"int8": 0.3, "int4": 0.2}  # of float32's memory, at most
QUICK = {"xla_backend_optimization_level": 0}  # of the compiler


forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0], compiler_options=QUICK)
forward_on_mesh = jax.jit(
    lambda model, tokens_BT: model(tokens_BT, execution=ON_MESH)[0], compiler_options=QUICK
)
score = jax.jit(token_logprobs.__wrapped__, compiler_options=QUICK)


def model_of(**changes):
    return make_model(**SIZES | {"num_layers": 2} | changes)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(found, right):
    return float(np.linalg.norm(np.asarray(found) - right) / np.linalg.norm(right))


def test_int8_of_a_known_matrix():
    kernel = jnp.asarray([[1.0, -2.54, 0.5], [0, 0, 0], [0.127, 0.01, -0.05]])
    found = to_int8(kernel)
    np.testing.assert_array_equal(found.values, [[50, -127, 25], [0, 0, 0], [127, 10, -50]])
    np.testing.assert_allclose(found.scale, [0.02, 0, 0.001], rtol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_keeps_equally_spaced_numbers_exactly(group_size):
    whole = np.random.default_rng(0).integers(0, 16, SHAPE)
    whole[:, ::32], whole[:, 1::32] = 0, 15
    groups = np.arange(math.prod(SHAPE) // group_size).reshape(SHAPE[0], -1)
    slopes = np.repeat(2.0 ** (groups % 5), group_size, axis=1)
    kernel = (whole * slopes - 4 * slopes).astype(np.float32)
    found = to_int4(jnp.asarray(kernel), group_size)
    assert found.scale.shape == found.minimum.shape == groups.shape
    np.testing.assert_array_equal(found.dequantize(SHAPE[1], FLOAT32), kernel)


def test_int4_keeps_zeros_and_constant_rows_exactly():
    kernel = np.zeros((2, 70), np.float32)
    kernel[1] = 0.5
    np.testing.assert_array_equal(to_int4(jnp.asarray(kernel), 32).dequantize(70, FLOAT32), kernel)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.008), (32, 0.075), (64, 0.09)])
def test_relative_error_of_random_matrices(kind, most):
    kernel = normal(SHAPE)
    found = to_int8(kernel) if kind == "int8" else to_int4(kernel, kind)
    assert 0.001 < relative_error(found.dequantize(SHAPE[1], FLOAT32), kernel) < most


def test_int4_is_closer_than_rounding_to_the_full_range():
    kernel = normal(SHAPE)
    groups = kernel.reshape(SHAPE[0], -1, 32)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    step = (high - low) / 15
    plain = np.round((groups - low) / step) * step + low
    found = to_int4(kernel, 32).dequantize(SHAPE[1], FLOAT32)
    assert relative_error(found, kernel) < 0.95 * relative_error(plain.reshape(SHAPE), kernel)


@pytest.mark.parametrize(("kind", "most"), [slow(("int8", 0.01)), ("int4", 0.12)])
def test_a_quantized_linear_layer_has_the_interface_of_the_float_one(kind, most):
    model = model_of()
    old, new = unstack(model), quantize(model, kind)
    for name, x in (("wq", normal((3, 5, 128))), ("wo", normal((3, 5, 8, 16)))):
        linear, ours = (getattr(m.blocks[1].attention, name) for m in (old, new))
        assert isinstance(linear, Linear | OutputsFirstLinear)
        assert isinstance(ours, QuantizedLinear)
        assert (ours.inputs, ours.outputs) == (linear.inputs, linear.outputs)
        found, right = ours(jnp.asarray(x)), linear(jnp.asarray(x))
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
        assert relative_error(found, np.asarray(right)) < most


@pytest.mark.parametrize(
    ("kind", "most", "tied"),
    [
        ("int8", 0.06, True),
        ("int4", 0.3, False),
    ],
)
def test_logits_are_close_from_stacked_and_unstacked_blocks(kind, most, tied):
    model = model_of(tied_embeddings=tied)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 56, (3, 11)))
    before = jax.tree.map(np.asarray, model)
    right = forward(model, tokens_BT)
    found = forward(quantize(model, kind), tokens_BT)
    assert relative_error(found, np.asarray(right)) < most
    again = forward(quantize(unstack(model), kind), tokens_BT)
    np.testing.assert_array_equal(found, again)
    jax.tree.map(np.testing.assert_array_equal, model, before)  # it is as it was


@pytest.mark.slow
def test_bfloat16_models():
    model = model_of(compute_dtype="bfloat16")
    narrow = jax.tree.map(lambda array: array.astype(jnp.bfloat16), model)
    tokens_BT = jnp.asarray([[1, 2, 3, 4]])
    right = forward(model, tokens_BT)
    found = forward(quantize(narrow, "int8"), tokens_BT)
    assert relative_error(found, np.asarray(right)) < 0.06


@pytest.mark.parametrize(
    ("kind", "group_size", "changes"),
    [
        slow(("int8", 32, {"tied_embeddings": False})),
        ("int4", 32, {"vocab_size": 4000}),
        slow(("int4", 64, {})),
    ],
)
def test_memory_of_quantized_models(kind, group_size, changes):
    model = model_of(**changes)
    found = quantize(model, kind, group_size)
    held = sum(len(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(found))
    assert held == model_nbytes(found)
    assert held <= SHARE[kind] * model_nbytes(model)


@pytest.mark.parametrize("layers", slow_but([6], [6, 12, 32]))
@pytest.mark.parametrize(("kind", "group_size"), WAYS)
def test_memory_of_real_shapes(kind, group_size, layers):
    dim, heads, hidden = {6: (288, 6, 768), 12: (768, 12, 2048), 32: (4096, 32, 11008)}[layers]
    config = ModelConfig(
        vocab_size=32000,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_dim=hidden,
        context_length=64,
        tied_embeddings=layers < 32,
    )
    held = model_nbytes(abstract_quantized(config, kind, group_size))
    assert held <= SHARE[kind] * 4 * count_parameters(config)


@pytest.mark.slow
def test_the_float_arrays_are_freed():
    def alive():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = alive()
    model = model_of(num_layers=4)
    full = alive() - before
    model = quantize(model, "int8")
    assert alive() - before == model_nbytes(model) < 0.3 * full


@pytest.mark.parametrize(
    ("kind", "group_size", "tied"),
    [
        ("int8", 32, False),
        ("int4", 32, True),
    ],
)
def test_arrays_stored_by_name_restore_the_model(kind, group_size, tied):
    model = quantize(model_of(tied_embeddings=tied), kind, group_size)
    stored = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
    shapes = abstract_quantized(model.config, kind, group_size)
    assert stored["blocks.1.attention.wk.kernel"].dtype == np.int8
    assert stored["blocks.1.ffn.up.kernel"].dtype == (np.int8 if kind == "int8" else np.uint8)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in stored.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in named_leaves(shapes).items()
    }
    arrays = [jnp.asarray(stored[name]) for name in named_leaves(shapes)]
    restored = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    tokens_BT = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(forward(restored, tokens_BT), forward(model, tokens_BT))


def continued(model, prompts):
    rows = [[] for _ in prompts]
    request = Request.same_params(prompts, SamplingParams(temperature=0, max_tokens=8))
    for delta in Engine(model).generate(request):
        rows[delta.index] += delta.ids
    return rows


def test_on_a_mesh_each_device_multiplies_its_shards_of_int4():
    """Shards of outputs, of inputs (wo), and none where they are not whole blocks of inputs."""
    model = quantize(model_of(), "int4")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = shard_matmuls(jax.device_put(model, shardings(model, mesh)))
    found = {
        name: getattr(part, name).shards
        for part in (placed.blocks[0].attention, placed.blocks[0].ffn)
        for name in ("wq", "wk", "wo", "up", "down")
        if hasattr(part, name)
    }
    assert found == {
        "wq": ("tensor", "fsdp"),
        "wk": None,  # int8
        "wo": ("fsdp", "tensor"),
        "up": ("tensor", "fsdp"),
        "down": None,  # 192 inputs are three blocks
    }
    tokens_BT = jnp.asarray([[1, 2, 3], [4, 5, 55]])
    with jax.set_mesh(mesh):
        sharded = forward_on_mesh(placed, tokens_BT)
    assert relative_error(sharded, forward(model, tokens_BT)) < 1e-6


@pytest.mark.slow
def test_eight_devices_generate_what_one_generates():
    model = model_of(num_layers=1)
    model.embedding[...] *= 0.1  # or it would just repeat its last token
    model = quantize(model, "int8")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(model, shardings(model, mesh))
    parts = placed.blocks[0].ffn.gate
    for array in (parts.kernel[...], parts.scale[...]):
        assert array.sharding.shard_shape(array.shape)[0] == 96
    assert parts.kernel[...].addressable_shards[0].data.size == parts.kernel[...].size // 4
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7]]
    with jax.set_mesh(mesh):
        found = continued(placed, prompts)
    assert found == continued(model, prompts)
    assert len({token for row in found for token in row}) > 3


@pytest.mark.parametrize(("kind", "group_size"), WAYS)
def test_shapes_and_bytes_are_predicted_exactly(kind, group_size):
    config = model_of(num_layers=3, hidden_dim=200).config
    sizes = allocate(config, QuantizationConfig(kind, group_size))
    model = jax.eval_shape(lambda: quantize(Llama(config, rngs=nnx.Rngs(0)), kind, group_size))
    assert quantized_nbytes(config, sizes) == model_nbytes(model)
    shapes = abstract_quantized(config, kind, group_size)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(model)


def test_which_matrices_of_an_int4_model_are_int8():
    model = quantize(model_of(), "int4")
    attention = model.blocks[0].attention
    kinds = {name: layer.kernel.dtype for name, layer in vars(attention).items() if is_ours(layer)}
    assert kinds == {"wq": np.uint8, "wk": np.int8, "wv": np.int8, "wo": np.uint8}
    assert model.embedding.kernel.dtype == np.int8
    assert model.blocks[0].ffn.down.kernel.dtype == np.uint8
    large = abstract_quantized(model_of(vocab_size=4000).config, "int4")
    assert large.embedding.kernel.dtype == np.uint8, "in int8 it would not fit in a fifth"
    assert large.blocks[1].ffn.down.kernel.dtype == np.int8, "there is room for this"
    deep = abstract_quantized(model_of(num_layers=12).config, "int4", 64)
    assert [block.ffn.down.kernel.dtype for block in deep.blocks] == [np.uint8] * 11 + [np.int8]


def is_ours(layer):
    return isinstance(layer, QuantizedMatrix)


@pytest.mark.parametrize(
    ("kind", "group_size", "complaint"),
    [("int5", 32, "quantize='int5' is unknown"), ("int4", 48, "group_size=48 is not supported")],
)
def test_invalid_options_are_refused(kind, group_size, complaint):
    with pytest.raises(UsageError, match=complaint):
        quantize(make_model(), kind, group_size)


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(UsageError, match="quantized already"):
        quantize(quantize(make_model(), "int8"), "int8")


def perplexity(model, tokens_BT):
    return float(np.exp(-np.mean(score(model, tokens_BT)[0])))


@pytest.fixture(scope="module")
def stories(shared_data):
    """A published checkpoint, and the beginnings of stories."""
    tokenizer = load_tokenizer(shared_data / "tok512.model")
    texts = (shared_data / "tinystories.txt").read_text().split("<|endoftext|>")
    ids = [tokenizer.encode(text.strip(), bos=True, eos=False) for text in texts[:80]]
    tokens_BT = np.asarray([row[:192] for row in ids if len(row) >= 192])
    assert len(tokens_BT) > 40
    return built(llama2c.read(shared_data / "stories260K.bin")), tokens_BT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model trained for some seconds, and validation text."""
    folder = tmp_path_factory.mktemp("run")
    tokens = make_tokens(folder / "tokens", stories=400)
    changes = {"model__dim": 96, "model__hidden_dim": 192, "model__dropout": 0.0}
    config = make_config(
        tokens.path, folder / "ckpt", optimizer__steps=60, run__eval_every=60, **changes
    )
    with quick_runs(folder / "cache"):
        assert fit(config) == 0
    [ids, *_] = TokenFolder.open(tokens.path).arrays("validation")
    return load(folder / "ckpt").model, np.asarray(ids[: len(ids) // 32 * 32]).reshape(-1, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "kind", "group_size", "most"),
    [
        ("stories", "int4", 32, 0.05),
        ("stories", "int8", 32, 0.005),
        ("stories", "int4", 64, 0.05),
        ("trained", "int4", 32, 0.05),
    ],
)
def test_perplexity_rises_little(which, kind, group_size, most, request):
    model, tokens_BT = request.getfixturevalue(which)
    quantized = quantize(model, kind, group_size)
    before, after = (perplexity(m, jnp.asarray(tokens_BT)) for m in (model, quantized))
    print(which, kind, group_size, before, after / before - 1)
    assert 1 < before < 8
    assert after < (1 + most) * before
    if which == "stories":
        assert model_nbytes(quantized) <= SHARE[kind] * model_nbytes(model)
