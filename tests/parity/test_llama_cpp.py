"""Our GGUF files in llama.cpp: the same tokens in, the same story out, the same blocks."""

import ctypes
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_weights import tiny_vocabulary, tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.formats.gguf import model as gguf
from llama_jax.formats.gguf.header import read_header
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.weights import of_layer
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.model.parameters import abstract, named_leaves
from llama_jax.model.transformer import unstack
from llama_jax.text.tokenizer import load_tokenizer, parse_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PROMPT = "Once upon a time"
TOKENS = 200
KINDS = {"Q4_0": 2, "Q8_0": 7}  # llama.cpp's numbers of whole files
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=8)
MODELS = {  # by name: our config where it differs
    "tied": {},
    "untied": {"tied_embeddings": False},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=2.5)},
    "llama3": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=16)},
    "yarn": {"rope_scaling": YARN},
    "yarn, by hand": {
        "rope_scaling": dataclasses.replace(YARN, attention_factor=0.8, beta_fast=2.0)
    },
    "attention biases": {"attention_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True, "tied_embeddings": False},
    "wide heads": {"head_dim": 24},
}


def in_float32(weights):
    """The model, computing in float32."""
    model = abstract(dataclasses.replace(weights.config, compute_dtype="float32"))
    arrays = []
    for name in named_leaves(model):
        layers = range(weights.config.num_layers) if name.startswith("blocks.") else []
        parts = [weights.tensors[of_layer(name, layer)].read() for layer in layers]
        array = np.stack(parts) if parts else weights.tensors[name].read()
        arrays.append(jnp.asarray(array, jnp.float32))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


def quantized(source, target, kind):
    """A file as llama.cpp's own quantiser makes it, which only llama-cpp-python offers."""
    llama_cpp = pytest.importorskip("llama_cpp")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = KINDS[kind], 1
    names = str(source).encode(), str(target).encode()
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(parameters)) == 0
    return target


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "tok512.model")


@pytest.fixture(scope="module")
def stories(shared_data):
    weights = llama2c.read(shared_data / "stories260K.bin")
    return dataclasses.replace(weights, tokenizer=(shared_data / "tok512.model").read_bytes())


def our_story(weights, prompt):
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    request = Request(prompts=[prompt], params=[greedy], stop_ids=[1])
    deltas = Engine(unstack(in_float32(weights))).generate(request)
    return [token for delta in deltas for token in delta.ids]


def their_story(model, prompt):
    story, _ = model.complete(prompt, TOKENS)
    return list(itertools.takewhile(lambda token: token != 1, story))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_story(llama_cpp, stories, tokenizer, tmp_path, dtype):
    path = tmp_path / "stories.gguf"
    gguf.write(stories, path, dtype=dtype)
    prompt, theirs = tokenizer.encode(PROMPT, bos=True, eos=False), llama_cpp(path)
    assert theirs.tokenize(PROMPT, bos=True) == prompt
    story = their_story(theirs, prompt)
    assert len(story) >= 64
    assert story == our_story(stories, prompt)


def test_the_same_story_from_8_bits(llama_cpp, stories, tokenizer, tmp_path):
    path = tmp_path / "stories.gguf"
    gguf.write(stories, path, dtype="q8_0")
    prompt = tokenizer.encode(PROMPT, bos=True, eos=False)
    story, ours = their_story(llama_cpp(path), prompt), our_story(gguf.read(path), prompt)
    same = next((i for i, pair in enumerate(zip(story, ours)) if len(set(pair)) > 1), len(ours))
    assert same >= 64, "llama.cpp rounds activations to 8 bits as well, so the stories may part"


def test_q8_0_is_what_llama_cpp_makes(stories, tmp_path):
    whole, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("whole", "ours", "theirs"))
    gguf.write(stories, whole)
    gguf.write(stories, ours, dtype="q8_0")
    quantized(whole, theirs, "Q8_0")
    contents = []
    for path in (ours, theirs):
        raw, tensors = path.read_bytes(), read_header(path).tensors
        contents.append(
            {name: (t.number, raw[t.offset : t.offset + t.nbytes]) for name, t in tensors.items()}
        )
    assert contents[0] == contents[1]


def test_q4_0_of_llama_cpp_is_read(tmp_path):
    whole, small = tmp_path / "whole.gguf", tmp_path / "small.gguf"
    sizes = {"dim": 256, "num_heads": 8, "hidden_dim": 512, "tied_embeddings": False}
    weights = tiny_weights(**sizes)
    gguf.write(weights, whole)
    found = gguf.read(quantized(whole, small, "Q4_0"))
    assert {t.type_number for t in read_header(small).tensors.values()} == {0, 2, 14}, (
        "its output is Q6_K"
    )
    assert (found.config, found.tokenizer) == (weights.config, weights.tokenizer)
    for name, tensor in weights.tensors.items():
        error = np.abs(tensor.read() - found.tensors[name].read()).max()
        assert error <= (0 if "norm" in name else 0.02 if name == "output" else 0.1), name


@pytest.mark.parametrize("name", MODELS)
def test_the_same_probabilities(llama_cpp, tmp_path, name):
    path = tmp_path / "tiny.gguf"
    shape = {"dim": 96, "num_kv_heads": 3, "rope_theta": 500.0, "norm_eps": 1e-6}
    weights = tiny_weights(**shape | MODELS[name])
    gguf.write(weights, path)
    prompt, model = [1, *np.random.default_rng(0).integers(3, 283, 30).tolist()], llama_cpp(path)
    ours_TV = np.asarray(jax.nn.log_softmax(in_float32(weights)(jnp.asarray([prompt]))[0][0]))
    assert np.abs(ours_TV).max() > 1
    compared = 0
    for length in range(3, len(prompt) + 1, 3):
        _, entries = model.complete(prompt[:length], 1, weights.config.vocab_size)
        for entry in entries:  # none after a byte that is half a character
            theirs = {each["id"]: each["logprob"] for each in entry["top_logprobs"]}
            found = [theirs[token] for token in range(weights.config.vocab_size)]
            np.testing.assert_allclose(found, ours_TV[length - 1], atol=1e-4)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("changes", [{}, {"adds_space": False}, {"bos_id": -1}], ids=str)
def test_the_same_tokens(llama_cpp, tmp_path, changes):
    """Pieces, bytes and the space before a text; with and without BOS."""
    model = dataclasses.replace(tiny_vocabulary(), **changes).to_model()
    has_bos = "bos_id" not in changes
    weights = dataclasses.replace(tiny_weights(tokenizer=model), bos=has_bos)
    gguf.write(weights, tmp_path / "tiny.gguf")
    theirs, ours = llama_cpp(tmp_path / "tiny.gguf", context=32), parse_tokenizer(model, tmp_path)
    for text in ("a", "ab abc  bcab", " é\n\t猫", "<s>", "cab bab abcabc"):
        expected = ours.encode(text, bos=has_bos, eos=False)
        assert theirs.tokenize(text, bos=True) == expected
