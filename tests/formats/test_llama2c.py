"""llama2.c's three versions against files made by hand, and there and back to the byte."""

import dataclasses
import weakref

import llama2c_files
import numpy as np
import pytest
from llama2c_files import SIZES, arrays, version0, version1, version2
from tiny_weights import same, tiny_weights

from llama_jax.config import RopeScaling
from llama_jax.errors import UserError
from llama_jax.formats.llama2c.model import read, write
from llama_jax.formats.weights import Tensor

LAYERS, HEADS, KV_HEADS, HEAD = 3, 6, 2, 8
KINDS = {"attention.wq.kernel": "wq", "attention.wk.kernel": "wk", "attention.wv.kernel": "wv"}
KINDS |= {"attention.wo.kernel": "wo", "ffn.gate.kernel": "w1", "ffn.down.kernel": "w2"}
KINDS |= {"ffn.up.kernel": "w3", "attention_norm.scale": "attention_norm"}
KINDS |= {"ffn_norm.scale": "ffn_norm"}


@pytest.fixture
def place(tmp_path):
    """A function that puts bytes into a file of a name."""

    def put(content, name="model.bin"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return put


def turned(w_NHD):
    """Rows of heads as ours: what lies side by side moves half a head apart."""
    return np.concatenate([w_NHD[:, ::2], w_NHD[:, 1::2]], axis=1)


def expected(made):
    """Our tensors from theirs, in words of their own."""
    ours = {"embedding": made["embedding"], "norm.scale": made["norm"]}
    ours |= {"output": made["output"]} if "output" in made else {}
    for name, kind in KINDS.items():
        for layer, w in enumerate(made[kind]):
            if kind in ("wq", "wk"):
                w = np.moveaxis(turned(w.reshape(-1, HEAD, 48)), -1, 0)
            elif kind == "wv":
                w = np.moveaxis(w.reshape(KV_HEADS, HEAD, 48), -1, 0)
            elif kind == "wo":
                w = np.moveaxis(w.reshape(48, HEADS, HEAD), 0, -1)
            elif w.ndim == 2:
                w = w.T
            ours[f"blocks.{layer}.{name}"] = w
    return ours


def holds(weights, ours):
    """Assert that a model has these tensors, bit for bit."""
    assert weights.tensors.keys() == ours.keys()
    for name, tensor in weights.tensors.items():
        array = tensor.read()
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert (array.shape, array.dtype) == (ours[name].shape, np.float32), name
        assert array.tobytes() == np.ascontiguousarray(ours[name]).tobytes(), name


def near(before, after):
    """Assert that matrices differ by half a step of int8 at most, and norms not at all."""
    for name, tensor in after.tensors.items():
        exact = before.tensors[name].read().astype(np.float32)
        bound = 0 if exact.ndim == 1 else np.abs(exact).max() / 254 * 1.0001
        assert np.abs(exact - tensor.read()).max() <= bound, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_made_by_hand_is_read_to_the_bit(place, version, tied):
    made = arrays(tied=tied)
    file = [version0(made), version1(made)][version] if version < 2 else b""
    if version == 2:
        file, made = version2(made, 8)
    weights = read(place(file))
    holds(weights, expected(made))
    config = weights.config
    assert (config.vocab_size, config.dim, config.num_layers) == (53, 48, 3)
    assert (config.num_heads, config.num_kv_heads, config.ffn_dim) == (6, 2, 40)
    assert (config.context_length, config.tied_embeddings) == (32, tied)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 10000.0)
    assert (weights.tokenizer, weights.bos, weights.dtype) == (b"", True, np.float32)


@pytest.mark.parametrize("group", [1, 3, 16, 48])
def test_groups_may_span_rows(place, group):
    file, meant = version2(arrays(), group)  # rows out of the feed-forward have 40
    holds(read(place(file)), expected(meant))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_a_file_made_by_hand_is_rewritten_to_the_byte(place, version, tied):
    made = arrays(tied=tied)
    file = version1(made) if version == 1 else version2(made, 8)[0]
    path = place(file)
    write(read(path), path.with_name("again.bin"), version, group_size=8)
    assert path.with_name("again.bin").read_bytes() == file


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_version_is_rewritten_with_tables(place, tied):
    made = arrays(tied=tied)
    path = place(version0(made))
    write(read(path), path.with_name("again.bin"), 0)
    again = path.with_name("again.bin").read_bytes()
    start = 28 + 4 * (sum(array.size for kind, array in made.items() if kind != "output"))
    tables = np.frombuffer(again, np.float32, 32 * HEAD, start).reshape(2, 32, HEAD // 2)
    assert again == version0(made, tables=tables)
    angles = np.arange(32)[:, None] * 10000.0 ** -(np.arange(0, HEAD, 2) / HEAD)
    np.testing.assert_allclose(tables, [np.cos(angles), np.sin(angles)], atol=2e-6)


def test_a_real_file_is_rewritten_to_the_byte_but_for_its_tables(shared_data, tmp_path):
    path = shared_data / "stories260K.bin"
    write(read(path), tmp_path / "again.bin", 0)
    before, after = path.read_bytes(), (tmp_path / "again.bin").read_bytes()
    tables = 4 * 512 * 8  # at the end, since the model is tied
    assert after[:-tables] == before[:-tables]
    found, real = (np.frombuffer(content[-tables:], np.float32) for content in (after, before))
    np.testing.assert_allclose(found, real, atol=2e-7)


@pytest.mark.parametrize(("version", "size"), [(1, 1_040_384), (2, 521_728)])
def test_a_real_model_survives_other_versions(shared_data, tmp_path, version, size):
    before = read(shared_data / "stories260K.bin")
    write(before, tmp_path / "once.bin", version)
    assert (tmp_path / "once.bin").stat().st_size == size
    after = read(tmp_path / "once.bin")
    write(after, tmp_path / "twice.bin", version)
    assert (tmp_path / "once.bin").read_bytes() == (tmp_path / "twice.bin").read_bytes()
    if version == 1:
        same(before, after)
    else:
        near(before, after)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_reads_as_the_same_numbers(tmp_path, version, dtype, tied):
    weights = tiny_weights(dim=48, dtype=dtype, tied_embeddings=tied)
    write(weights, tmp_path / "x.bin", version)
    again = read(tmp_path / "x.bin")
    same(weights.astype(np.dtype(np.float32)), again)
    assert again.config == weights.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_numbers_are_off_by_half_a_step_at_most(tmp_path, dtype):
    weights = tiny_weights(dim=48, dtype=dtype)
    write(weights, tmp_path / "x.bin", 2, group_size=64)  # of which 8 divides 48 and 40
    again = read(tmp_path / "x.bin")
    assert again.config == weights.config
    assert (tmp_path / "x.bin").read_bytes()[37:41] == b"\x08\0\0\0"
    near(weights, again)


def test_groups_have_64_numbers_where_these_divide_all_rows(tmp_path):
    write(tiny_weights(dim=192, hidden_dim=128), tmp_path / "x.bin", 2)
    assert (tmp_path / "x.bin").read_bytes()[37:41] == b"\x40\0\0\0"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_each_tensor_is_read_once_and_dropped_before_the_next(tmp_path, version):
    weights, alive, reads, done = tiny_weights(tied_embeddings=False), [], [], []

    def counted(name, tensor):
        def read():
            assert not any(array() is not None for array in alive)
            array = tensor.read().copy()
            alive.append(weakref.ref(array))
            reads.append(name)
            return array

        return Tensor(tensor.shape, tensor.dtype, read)

    tensors = {name: counted(name, tensor) for name, tensor in weights.tensors.items()}
    weights = dataclasses.replace(weights, tensors=tensors)
    write(weights, tmp_path / "x.bin", version, report=done.append)
    assert sorted(reads) == sorted(tensors)
    queries = [name for name in reads if ".wq." in name]
    assert reads[reads.index(queries[0]) :][:LAYERS] == queries
    assert done == np.cumsum([tensors[name].nbytes for name in reads]).tolist()


def test_tensors_are_read_lazily(place):
    path = place(version1(arrays()))
    weights = read(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="copy it again"):
        weights.tensors["blocks.2.ffn.up.kernel"].read()
    assert weights.tensors["norm.scale"].read().shape == (48,)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ({"rope_theta": 500000.0}, "rope_theta=500000.0"),
        ({"rope_scaling": RopeScaling(kind="linear", factor=2.0)}, "rope_scaling=linear"),
        ({"attention_bias": True, "sliding_window": 9}, "attention_bias=True, sliding_window=9"),
        ({"position": "absolute"}, "position=absolute"),
        ({"norm_eps": 1e-6, "rope_theta": 1e6}, "norm_eps=1e-06, rope_theta=1000000.0"),
    ],
)
@pytest.mark.parametrize("version", [0, 1, 2])
def test_settings_that_llama2c_cannot_store_are_refused(tmp_path, version, changes, lost):
    with pytest.raises(UserError, match=f"llama2.c has no place for {lost}: ") as caught:
        write(tiny_weights(**changes), tmp_path / "x.bin", version)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_context_that_does_not_fit_is_refused(tmp_path):
    context = 2**24 + 1
    with pytest.raises(UserError, match=f"max_seq_len={context} out of range"):
        write(tiny_weights(context_length=context), tmp_path / "x.bin", 1)


@pytest.mark.parametrize("version", [-1, 3])
def test_unknown_versions_are_refused(tmp_path, version):
    with pytest.raises(UserError, match=f"no version {version}; choose 0, 1 or 2"):
        write(tiny_weights(), tmp_path / "x.bin", version)


@pytest.mark.parametrize("group_size", [0, -64])
def test_group_sizes_below_one_are_refused(tmp_path, group_size):
    with pytest.raises(UserError, match=f"group_size={group_size} is out of range"):
        write(tiny_weights(), tmp_path / "x.bin", 2, group_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_cannot_be_quantised(tmp_path, bad):
    weights = tiny_weights()
    broken = weights.tensors["embedding"].read().copy()
    broken[1, 2] = bad
    tensors = dict(weights.tensors) | {
        "embedding": Tensor(broken.shape, broken.dtype, lambda: broken)
    }
    weights = dataclasses.replace(weights, tensors=tensors)
    with pytest.raises(UserError, match=r"tok_embeddings.weight holds NaN or infinity"):
        write(weights, tmp_path / "x.bin", 2)
    write(weights, tmp_path / "y.bin", 1)
    again = read(tmp_path / "y.bin").tensors["embedding"].read()
    np.testing.assert_array_equal(again, broken)


def test_the_files_made_by_hand_have_the_documented_sizes():
    D, F, L, N, K, V, S = SIZES.values()
    kv = K * D // N
    count = V * D + 2 * L * D + L * (2 * D * D + 2 * kv * D) + 3 * L * D * F + D
    assert len(version0(arrays())) == 28 + 4 * (count + S * D // N)
    assert len(version1(arrays())) == 256 + 4 * count
    assert llama2c_files.header(1, SIZES, True)[:8] == b"24ka\1\0\0\0"
