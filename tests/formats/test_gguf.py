"""GGUF files of whole models, against the `gguf` package on both sides."""

import dataclasses
import tracemalloc
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from tiny_weights import same, tiny_vocabulary, tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats.gguf import model as gguf
from llama_jax.formats.gguf.header import Keys, read_header
from llama_jax.formats.gguf.vocabulary import read_tokenizer, tokenizer_keys
from llama_jax.formats.vocabulary import Kind, Vocabulary
from llama_jax.formats.weights import DTYPES, Tensor
from llama_jax.text.tokenizer import load_tokenizer, parse_tokenizer

D, N, K, H, F, L, V = 24, 6, 2, 4, 40, 3, 283
WIDE = {"dim": 96, "hidden_dim": 40}  # rows of down are no whole blocks, all others are
YARN = RopeScaling(kind="yarn", factor=4.0, original_context=8)
LONG = {**WIDE, "rope_theta": 5e5}  # wavelengths on both sides of Llama 3's edges


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def as_written(weights):
    """What a file without rounding holds: vectors in float32, and a dtype to compute in."""
    tensors = {
        name: tensor.astype(DTYPES["float32"]) if "norm" in name or "bias" in name else tensor
        for name, tensor in weights.tensors.items()
    }
    compute = "float32" if weights.dtype == np.float32 else "bfloat16"
    config = dataclasses.replace(weights.config, compute_dtype=compute)
    return dataclasses.replace(weights, tensors=tensors, config=config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "num_kv_heads": 6},
        {"norm_eps": 1e-6, "rope_scaling": RopeScaling(kind="linear", factor=2.5)},
        {**LONG, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
        {**LONG, "rope_scaling": RopeScaling(kind="llama3", factor=32.0, original_context=4096)},
        {**LONG, "rope_scaling": RopeScaling(kind="llama3", factor=5.5)},
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": YARN},
        {"rope_scaling": dataclasses.replace(YARN, beta_fast=16.0, attention_factor=0.7)},
    ],
    ids=[
        *("plain", "untied", "linear", "llama3", "llama3 of another context", "llama3 by 5.5"),
        *("biases and yarn", "yarn with factors"),
    ],
)
def test_what_is_written_is_read(path, dtype, changes):
    weights = tiny_weights(dtype=dtype, **changes)
    gguf.write(weights, path, dtype=dtype)
    found, expected = gguf.read(path), as_written(weights)
    same(found, expected)
    assert (found.config, found.tokenizer, found.bos) == (expected.config, weights.tokenizer, True)


def test_dtypes_are_chosen_by_the_weights(path):
    for dtype, expected in {
        "float32": "float32",
        "float16": "float16",
        "bfloat16": "bfloat16",
    }.items():
        gguf.write(tiny_weights(dtype=dtype), path)
        assert gguf.read(path).dtype == DTYPES[expected]
    with pytest.raises(UserError, match="'q4_0' is unknown to GGUF; expected one of float32"):
        gguf.write(tiny_weights(), path, dtype="q4_0")


def side_by_side(kernel):
    """A kernel [D, heads, H] as rows of which 2i and 2i + 1 of a head turn together."""
    rows = np.empty((kernel.shape[1], H, D), kernel.dtype)
    for i in range(H // 2):
        rows[:, 2 * i] = kernel[:, :, i].T
        rows[:, 2 * i + 1] = kernel[:, :, i + H // 2].T
    return rows.reshape(-1, D)


def theirs(weights):
    """Our arrays under GGUF's names, laid out by hand."""
    ours = {name: tensor.read() for name, tensor in weights.tensors.items()}
    arrays = {"token_embd.weight": ours["embedding"], "output_norm.weight": ours["norm.scale"]}
    arrays["output.weight"] = ours["output"]
    for i in range(L):
        there, here = f"blk.{i}.{{}}.weight", f"blocks.{i}."
        arrays[there.format("attn_norm")] = ours[f"{here}attention_norm.scale"]
        arrays[there.format("ffn_norm")] = ours[f"{here}ffn_norm.scale"]
        for name in "qk":
            rows = side_by_side(ours[f"{here}attention.w{name}.kernel"])
            arrays[there.format(f"attn_{name}")] = rows
        arrays[there.format("attn_v")] = ours[f"{here}attention.wv.kernel"].reshape(D, -1).T
        arrays[there.format("attn_output")] = ours[f"{here}attention.wo.kernel"].reshape(N * H, D).T
        for name in ("gate", "up", "down"):
            arrays[there.format(f"ffn_{name}")] = ours[f"{here}ffn.{name}.kernel"].T
    return arrays


def test_the_package_reads_what_we_write(path):
    weights = tiny_weights(
        tied_embeddings=False, rope_scaling=RopeScaling(kind="linear", factor=2.0)
    )
    weights = dataclasses.replace(weights, bos=False)
    gguf.write(weights, path)
    reader = package.GGUFReader(path)
    arrays = theirs(weights)
    assert {tensor.name for tensor in reader.tensors} == arrays.keys()
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, arrays[tensor.name], tensor.name)
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.context_length": 32,
        "llama.embedding_length": D,
        "llama.block_count": L,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": N,
        "llama.attention.head_count_kv": K,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.dimension_count": H,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "llama.vocab_size": V,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in tiny_vocabulary().pieces],
        "tokenizer.ggml.scores": [piece.score for piece in tiny_vocabulary().pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 24],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    assert {name: value for name, value in values.items() if name[:4] != "GGUF"} == expected
    assert gguf.read(path).bos is False


def write_with_package(path, weights, **options):
    """A file as llama.cpp's converter makes it, without the keys that have defaults."""
    writer = package.GGUFWriter(path, "llama", **options)
    writer.add_context_length(32)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    if weights.config.num_kv_heads != N:
        writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_uint32("llama.expert_count", 0)
    writer.add_tokenizer_model("llama")
    pieces = tiny_vocabulary().pieces
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([int(piece.kind) for piece in pieces])
    writer.add_uint32("tokenizer.ggml.padding_token_id", 2**32 - 1)
    writer.add_uint32("tokenizer.ggml.seperator_token_id", 2**32 - 1)
    for name, array in theirs(weights).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kv_heads", [K, N])
def test_we_read_what_the_package_writes(path, kv_heads):
    weights = tiny_weights(tied_embeddings=False, num_kv_heads=kv_heads)
    write_with_package(path, weights)
    found = gguf.read(path)
    same(found, weights)
    assert (found.config, found.tokenizer, found.bos) == (weights.config, weights.tokenizer, True)


@pytest.fixture
def parts(tmp_path):
    """A model in four files."""
    weights = tiny_weights(tied_embeddings=False)
    write_with_package(tmp_path / "model.gguf", weights, split_max_tensors=9)
    return weights, [tmp_path / f"model-{i:05}-of-00004.gguf" for i in range(1, 5)]


def test_a_model_in_several_files(parts):
    weights, paths = parts
    same(gguf.read(paths[0]), weights)


def test_several_files_must_be_one_model(parts, tmp_path):
    _, paths = parts
    with pytest.raises(UserError, match=r"name the first, which ends in -00001-of-00004\.gguf"):
        gguf.read(paths[1])
    with pytest.raises(UserError, match="name the first"):
        gguf.read(paths[0].rename(tmp_path / "alone.gguf"))
    (tmp_path / "alone.gguf").rename(paths[0])
    third = paths[2].read_bytes()
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(UserError, match=r"-00003-of-00004\.gguf holds blk.*00002-of-00004\.gguf"):
        gguf.read(paths[0])
    paths[2].unlink()
    with pytest.raises(UserError, match=r"of which model-00003-of-00004\.gguf is missing; dow"):
        gguf.read(paths[0])
    paths[2].write_bytes(third)
    first, total = paths[0].read_bytes(), b"split.tensors.count"
    at = first.index(total) + len(total) + 4
    paths[0].write_bytes(first[:at] + b"\x30" + first[at + 1 :])
    with pytest.raises(UserError, match=r"hold 30 tensors; split\.tensors\.count says 48"):
        gguf.read(paths[0])


def test_q8_0_falls_back_where_rows_are_no_whole_blocks(path):
    weights = tiny_weights(tied_embeddings=False, **WIDE)
    gguf.write(weights, path, dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(path).tensors}
    for name, kind in kinds.items():
        assert kind == ("F32" if "norm" in name else "F16" if "ffn_down" in name else "Q8_0")
    found = gguf.read(path)
    assert (found.dtype, found.config) == (np.float32, weights.config)
    for name, tensor in weights.tensors.items():
        ours, theirs = tensor.read(), found.tensors[name].read()
        assert theirs.dtype == found.tensors[name].dtype
        bound = 0 if "norm" in name else np.abs(ours).max() / 127 * 0.6
        assert np.abs(ours - theirs.astype(np.float32)).max() <= bound, name


def test_each_tensor_is_read_once_and_dropped(path):
    sizes = {"num_layers": 9, "dim": 192, "hidden_dim": 320}
    weights, read = tiny_weights(**sizes), []

    def anew(name, shape):
        return Tensor(
            shape, DTYPES["float32"], lambda: [np.ones(shape, np.float32), read.append(name)][0]
        )

    tensors = {name: anew(name, tensor.shape) for name, tensor in weights.tensors.items()}
    weights, reports = dataclasses.replace(weights, tensors=tensors), []
    tracemalloc.start()
    gguf.write(weights, path, report=reports.append)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read) == len(set(read)) == len(tensors)
    assert reports == sorted(reports)
    assert reports[-1] == sum(tensor.nbytes for tensor in tensors.values())
    assert most < 4 * max(tensor.nbytes for tensor in tensors.values()) + 500_000 < reports[-1]


def test_the_vocabulary_of_a_file_without_tensors(shared_data, tmp_path):
    source = shared_data / "llama-spm.gguf"
    vocabulary = Vocabulary.from_model(read_tokenizer(read_header(source).keys))
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.to_model())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    texts = (shared_data / "llama-spm.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (shared_data / "llama-spm.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines):
        assert tokenizer.encode(text, bos=False, eos=False) == [
            int(token) for token in line.split()
        ]
    with pytest.raises(UserError, match=r"holds no token_embd\.weight; expected a whole model"):
        gguf.read(source)


def test_vocabularies_keep_all_they_say(path):
    vocabulary = dataclasses.replace(
        tiny_vocabulary(), pad_id=5, adds_space=False, joins_spaces=True, characters=b"\1\0\xff"
    )
    gguf.write(tiny_weights(tokenizer=vocabulary.to_model()), path)
    assert Vocabulary.from_model(read_tokenizer(read_header(path).keys)) == vocabulary


def vocabulary_of(**changes):
    """A vocabulary as read from the keys of a file; None: a key that is missing."""
    keys = tokenizer_keys(tiny_vocabulary().to_model(), bos=True)
    keys |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    content = read_tokenizer(Keys(Path("model.gguf"), keys))
    return Vocabulary.from_model(content), parse_tokenizer(content, Path("model.gguf"))


@pytest.mark.parametrize("missing", ["scores", "token_type", "both"])
def test_vocabularies_without_scores_or_types_are_read(missing):
    names = ["scores", "token_type"] if missing == "both" else [missing]
    vocabulary, tokenizer = vocabulary_of(**dict.fromkeys(names))
    expected = tiny_vocabulary().pieces
    if missing != "token_type":
        expected = tuple(dataclasses.replace(piece, score=0.0) for piece in expected)
    assert vocabulary.pieces == expected  # <unk>, <s>, </s> and bytes by their ids and names
    assert tokenizer.decode(tokenizer.encode("abc é")) == "abc é"
    if missing != "token_type":  # all pairs are as good: the leftmost is merged first
        assert [tokenizer.piece_text(i) for i in tokenizer.encode("abc")] == [" ab", "c"]


def test_of_repeated_pieces_the_last_is_meant():
    texts = [piece.text for piece in tiny_vocabulary().pieces]
    texts[270] = "ab"  # instead of "e"
    vocabulary, tokenizer = vocabulary_of(tokens=texts)
    assert vocabulary.pieces[texts.index("ab")].kind == Kind.UNUSED
    assert vocabulary.pieces[270].text == "ab"
    assert len({piece.text for piece in vocabulary.pieces}) == V
    assert tokenizer.encode("bab")[-1] == 270
