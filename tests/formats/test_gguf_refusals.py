"""GGUF files that are well formed but cannot be read or written."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType as BlockType
from tiny_weights import tiny_vocabulary, tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats.gguf import model as gguf
from llama_jax.formats.gguf.files import lazy_tensors, write_file
from llama_jax.formats.gguf.header import read_header
from llama_jax.formats.gguf.vocabulary import tokenizer_keys
from llama_jax.formats.vocabulary import Kind
from llama_jax.formats.weights import Tensor

D, F, V = 24, 40, 283
WIDE = {"dim": 96, "hidden_dim": 40}
LONG = {**WIDE, "rope_theta": 5e5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def changed(path, weights, keys=(), tensors=(), without=(), architecture="llama"):
    """Write a file with other keys and tensors than `write` gives it."""
    gguf.write(weights, path)
    header = read_header(path)
    arrays = {name: t.read().copy() for name, t in lazy_tensors(path, header.tensors).items()}
    parts = [
        {**header.keys.values, **dict(keys)},
        {**{name: lazy(array) for name, array in arrays.items()}, **dict(tensors)},
    ]
    hidden = {"general.architecture", *without}
    parts = [{n: v for n, v in part.items() if n not in hidden} for part in parts]
    write_file(path, architecture, *parts, BlockType.F32, lambda done: None)


def lazy(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def test_a_file_without_a_tokenizer(path):
    changed(path, tiny_weights(), keys={"tokenizer.ggml.model": "no_vocab"})
    assert gguf.read(path).tokenizer == b""


PIECES = "tokenizer.ggml."
REFUSED = {  # keys, then what is said of them
    "experts": ({"llama.expert_count": 8}, "mixes 8 experts"),
    "another tokenizer": ({f"{PIECES}model": "bert"}, "a tokenizer of kind 'bert'"),
    "an unknown key": ({"llama.attention.scale": 0.5}, "attention.scale = 0.5, which is not"),
    "a head dim of its own": ({"llama.attention.key_length": 8}, "expected the head dim, 8"),
    "a part rotated": ({"llama.rope.dimension_count": 2}, "dimension_count = 2"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "'longrope'; expected none, linear"),
    "no causal mask": ({"llama.attention.causal": False}, "attention.causal = False"),
    "a part of yarn": ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5"),
    "a shrinking context": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5},
        "factor=0.5 is out of range",
    ),
    "heads that do not divide": ({"llama.attention.head_count": 5}, "does not divide into"),
    "no heads": ({"llama.attention.head_count": 0}, "num_heads=0 is out of range"),
    "heads by layer": ({"llama.attention.head_count_kv": np.array([2, 2, 2])}, "= a list"),
    "eps in words": (
        {"llama.attention.layer_norm_rms_epsilon": "small"},
        "'small'; expected a num",
    ),
    "eps of infinity": ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "out of range"),
    "very many blocks": ({"llama.block_count": 2**31 - 1}, "describes 2,147,483,647 blocks"),
    "a wide model": (
        {"llama.embedding_length": 6 * 2**28, "llama.rope.dimension_count": 2**28},
        "describes 3 blocks",
    ),
    "a deep feed-forward": ({"llama.feed_forward_length": 2**30}, "describes 3 blocks"),
    "very many thin blocks": (
        {"llama.embedding_length": 2, "llama.attention.head_count": 1}
        | {"llama.attention.head_count_kv": 1, "llama.rope.dimension_count": 2}
        | {"llama.feed_forward_length": 1, "llama.block_count": 10**5},
        "describes 100,000 blocks of 22 numbers",
    ),
    "blocks in truths": ({"llama.block_count": True}, "= True; expected an integer"),
    "theta in truths": ({"llama.rope.freq_base": True}, "= True; expected a number"),
    "fewer blocks": ({"llama.block_count": 2}, "blk.2.attn_norm.weight, "),
    "more blocks": ({"llama.block_count": 4}, "blk.3.attn_norm.weight, "),
    "another width": ({"llama.feed_forward_length": 48}, "is [40, 24], expected [48, 24]"),
    "fewer scores": ({f"{PIECES}scores": np.zeros(282, np.float32)}, "283 tokens and 282 scores"),
    "an endless score": ({f"{PIECES}scores": np.full(283, np.nan, np.float32)}, "not a number"),
    "a token type of 7": ({f"{PIECES}token_type": np.full(283, 7, np.int32)}, "other than 1 to 6"),
    "types in words": ({f"{PIECES}token_type": ["a"] * 283}, "= a list; expected a list of num"),
    "an id too high": ({f"{PIECES}bos_token_id": 283}, "= 283; expected 0 to 282"),
    "bos in numbers": ({f"{PIECES}add_bos_token": 1}, "= 1; expected true or false"),
}


def one_line(caught):
    message = str(caught.value)
    assert "tiny.gguf" in message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_are_refused(path, name):
    keys, complaint = REFUSED[name]
    changed(path, tiny_weights(), keys=keys)
    with pytest.raises(UserError) as caught:
        gguf.read(path)
    assert complaint in one_line(caught)


NEEDED = ["block_count", "context_length", "embedding_length", "feed_forward_length"]
NEEDED += ["attention.head_count", "attention.layer_norm_rms_epsilon"]


@pytest.mark.parametrize("key", NEEDED)
def test_keys_that_must_be_there(path, key):
    changed(path, tiny_weights(), without=[f"llama.{key}"])
    with pytest.raises(UserError, match=f"has no key llama.{key}"):
        gguf.read(path)


def test_harmless_keys_are_ignored(path):
    keys = {"llama.expert_count": 0, "llama.expert_used_count": 0, "llama.rope.scale_linear": 1.0}
    keys |= {"llama.vocab_size": 7, "general.anything": [], f"{PIECES}padding_token_id": 2**32 - 1}
    changed(path, tiny_weights(), keys=keys)
    assert gguf.read(path).config == tiny_weights().config


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"sliding_window": 9}, "model.sliding_window=9"),
        ({"position": "alibi"}, "model.position='alibi'"),
        ({"rope_scaling": RopeScaling(kind="dynamic", factor=2.0)}, "kind='dynamic'"),
        ({"rope_scaling": RopeScaling(kind="yarn", truncate=False)}, "truncate=False"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_written(path, changes, lost):
    with pytest.raises(UserError, match=f"{lost} has no place in a GGUF file"):
        gguf.write(tiny_weights(**changes), path)
    assert not path.exists()


def test_a_window_of_the_whole_context_is_none(path):
    gguf.write(tiny_weights(sliding_window=32), path)
    assert gguf.read(path).config == tiny_weights().config


def test_keys_of_other_writers_are_read(path):
    keys = {"llama.attention.sliding_window": 9, "llama.attention.causal": True}
    keys |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    keys |= {"llama.rope.scaling.yarn_ext_factor": 1.0, "llama.rope.freq_base": 5e5}
    changed(path, tiny_weights(), keys=keys)
    config = gguf.read(path).config
    assert (config.sliding_window, config.rope_theta) == (9, 5e5)
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_context=32)


def test_eos_is_a_control_token_whatever_its_type(path):
    kinds = np.array([piece.kind for piece in tiny_vocabulary().pieces], np.int32)
    kinds[2] = Kind.USER_DEFINED
    changed(path, tiny_weights(), keys={f"{PIECES}token_type": kinds})
    assert gguf.read(path).tokenizer == tiny_vocabulary().to_model()


def test_a_bias_that_is_missing_is_zero(path):
    weights = tiny_weights(attention_bias=True)
    changed(path, weights, without=["blk.1.attn_output.bias"])
    found = gguf.read(path)
    assert found.config == weights.config
    assert (found.tensors["blocks.1.attention.wo.bias"].read() == 0).all()
    assert (found.tensors["blocks.0.attention.wo.bias"].read() != 0).all()


def test_another_architecture_is_refused(path):
    changed(path, tiny_weights(), architecture="qwen2")
    with pytest.raises(UserError, match="a model of kind 'qwen2'; expected 'llama'"):
        gguf.read(path)


def test_long_values_are_cut_in_messages(path):
    changed(path, tiny_weights(), keys={"llama.attention.scale": "long" * 999})
    with pytest.raises(UserError, match="which is not Llama's") as caught:
        gguf.read(path)
    one_line(caught)


def test_tensors_must_be_those_of_a_llama(path):
    norm = lazy(np.zeros(4, np.float32))
    changed(
        path,
        tiny_weights(),
        tensors={"blk.0.attn_q_norm.weight": norm},
        without=["blk.1.ffn_up.weight", "output_norm.weight"],
    )
    with pytest.raises(UserError) as caught:
        gguf.read(path)
    message = one_line(caught)
    assert "blk.1.ffn_up.weight, output_norm.weight are missing" in message
    assert "blk.0.attn_q_norm.weight is unknown" in message


def test_a_file_without_an_embedding(path):
    changed(path, tiny_weights(), without=["token_embd.weight"])
    with pytest.raises(UserError, match=r"holds no token_embd\.weight"):
        gguf.read(path)


def test_rope_factors_of_another_rule_are_refused(path):
    for factors in (np.linspace(1, 9, 8), np.full(8, np.nan), np.ones(7), np.zeros(40_000)):
        tensors = {"rope_freqs.weight": lazy(factors.astype(np.float32))}
        changed(path, tiny_weights(**LONG), tensors=tensors)
        with pytest.raises(UserError, match="which is not Llama 3's rule"):
            gguf.read(path)
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    changed(path, tiny_weights(**LONG), keys=keys, tensors=tensors)
    with pytest.raises(UserError, match="scales positions twice"):
        gguf.read(path)


def test_huge_rope_factors_are_not_read(path):
    factors = {"rope_freqs.weight": lazy(np.zeros(4_000_000, np.float32))}
    changed(path, tiny_weights(), tensors=factors)
    tracemalloc.start()
    with pytest.raises(UserError, match="not Llama 3's rule"):
        gguf.read(path)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_types_that_are_not_read_are_named(path):
    gguf.write(tiny_weights(**WIDE), path, dtype="q8_0")
    content = path.read_bytes()
    for name in (b"blk.0.attn_q.weight", b"blk.2.ffn_up.weight"):
        at = content.index(name) + len(name) + 4 + 2 * 8
        assert content[at] == 8
        content = content[:at] + b"\x63" + content[at + 1 :]
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        gguf.read(path)
    expected = "stores blk.0.attn_q.weight and 1 more as type 99, which cannot be read"
    assert expected in one_line(caught)


def test_the_vocabulary_must_fit_the_embedding(path):
    vocabulary = tiny_vocabulary(270).to_model()
    weights = dataclasses.replace(tiny_weights(), tokenizer=vocabulary)
    with pytest.raises(UserError, match="the tokenizer has 270 pieces and the model 283"):
        gguf.write(weights, path)
    keys = tokenizer_keys(tiny_vocabulary(290).to_model(), bos=True)
    changed(path, tiny_weights(), keys=keys)
    with pytest.raises(UserError, match="has 290 pieces and the model 283 rows"):
        gguf.read(path)


def test_what_cannot_be_written(path):
    with pytest.raises(UserError, match="name a --tokenizer"):
        gguf.write(tiny_weights(tokenizer=b""), path)
    weights = tiny_weights()
    tensors = dict(weights.tensors)
    tensors["blocks.1.ffn.up.kernel"] = lazy(np.full((D, F), 1e5, np.float32))
    weights = dataclasses.replace(weights, tensors=tensors)
    with pytest.raises(
        UserError, match=r"blk\.1\.ffn_up\.weight has a number that F16 cannot hold"
    ):
        gguf.write(weights, path, dtype="float16")
