"""Quantised blocks in GGUF files: every type that the `gguf` package dequantises is read."""

import dataclasses

import gguf as package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as BlockType

from llama_jax.errors import UserError
from llama_jax.formats.gguf import files
from llama_jax.formats.gguf.files import PLAIN, lazy_tensors, write_file
from llama_jax.formats.gguf.header import read_header
from llama_jax.formats.weights import DTYPES, Tensor

ROWS = 37


def is_readable(kind):
    try:
        package.dequantize(np.zeros((1, package.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


READABLE = [kind for kind in package.GGML_QUANT_SIZES if is_readable(kind)]
OTHERS = [kind for kind in package.GGML_QUANT_SIZES if kind not in READABLE]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last not full."""
    monkeypatch.setattr(files, "CHUNK", 1000)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def lazy(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def with_blocks(path, kind, raw):
    """Write a file with one tensor of these bytes [rows, bytes], and one of floats after it."""
    writer = package.GGUFWriter(path, "llama")
    writer.add_tensor("a", raw, raw_dtype=kind)
    writer.add_tensor("b", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path).tensors


def written(path, array, kind):
    """The bytes and the header's description of a tensor that was written as a type."""
    write_file(path, "llama", {}, {"a": lazy(array)}, kind, lambda done: None)
    stored = read_header(path).tensors["a"]
    return path.read_bytes()[stored.offset : stored.offset + stored.nbytes], stored


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_any_bytes_are_read_as_the_package_does(path, kind):
    count, size = package.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (ROWS, 3 * size)).astype(np.uint8)
    with np.errstate(all="ignore"):
        expected = package.dequantize(raw, kind)
    found = lazy_tensors(path, with_blocks(path, kind, raw))
    tensor = found["a"]
    assert tensor.shape == (ROWS, 3 * count)
    assert tensor.dtype == PLAIN.get(kind, np.float32)
    np.testing.assert_array_equal(tensor.read().astype(np.float32), expected)
    assert found["b"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_common_types_are_readable():
    names = {kind.name for kind in READABLE}
    assert names >= {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ2_XXS", "IQ4_NL", "MXFP4", "TQ1_0"}
    assert names >= {f"Q{bits}_K" for bits in range(2, 7)}


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_other_types_are_refused_by_name(path, kind):
    count, size = package.GGML_QUANT_SIZES[kind]
    header = with_blocks(path, BlockType.F32, np.zeros((2, count), np.float32))
    stored = dataclasses.replace(header["a"], type_number=int(kind))
    assert stored.nbytes == 2 * size
    with pytest.raises(UserError, match=f"stores a as {kind.name}, which cannot be read; expected"):
        lazy_tensors(path, {"a": stored})


def test_unknown_types_are_refused_by_number(path):
    header = with_blocks(path, BlockType.F32, np.zeros((2, 3), np.float32))
    stored = {name: dataclasses.replace(header["a"], type_number=999) for name in "xyz"}
    with pytest.raises(UserError, match="stores x and 2 more as type 999, which cannot be read"):
        lazy_tensors(path, stored)


def numbers(columns=96):
    """Rows of many magnitudes, with a block of zeros and one of exact halves of a level."""
    random = np.random.default_rng(3)
    array = random.standard_normal((ROWS, columns)).astype(np.float32)
    array *= np.float32(10.0) ** np.linspace(-3, 3, ROWS, dtype=np.float32)[:, None]
    array[0, :32] = 0
    array[1, :32] = (np.arange(32, dtype=np.float32) - 15.5) * 2
    array[1, 0] = 127
    return array


def test_q8_0_is_written_as_the_package_does(path):
    array = numbers()
    found, stored = written(path, array, BlockType.Q8_0)
    assert found == package.quantize(array, BlockType.Q8_0).tobytes()
    back = lazy_tensors(path, {"a": stored})["a"].read()
    error = np.abs(back - array).reshape(-1, 32)
    level = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True) / 127
    assert (error <= level * (0.5 + 127 * 2**-11) + 2**-25 * 127).all()


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_floats_are_rounded_as_numpy_does(path, kind, dtype):
    array = numbers().astype(dtype)
    assert written(path, array, kind)[0] == array.astype(PLAIN[kind]).tobytes()


@pytest.mark.parametrize("kind", [BlockType.F16, BlockType.Q8_0])
@pytest.mark.parametrize("value", [2.0**24, np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_do_not_fit_are_refused(path, kind, value, dtype):
    array = numbers().astype(DTYPES[dtype])
    array[5, 40] = value
    with pytest.raises(UserError, match=f"a has a number that {kind.name} cannot hold"):
        written(path, array, kind)


def test_infinities_are_kept_where_the_type_is_kept(path):
    array = numbers().astype(np.float16)
    array[5, 40:42] = np.inf, np.nan
    assert written(path, array, BlockType.F16)[0] == array.tobytes()


def test_tiny_numbers_become_zero(path):
    found, _ = written(path, np.full((1, 32), 1e-38, np.float32), BlockType.Q8_0)
    assert not any(found)


def test_rows_that_are_no_whole_blocks_are_16_bit_floats(path):
    for dtype, kind in (("float32", "F16"), ("float16", "F16"), ("bfloat16", "BF16")):
        array = numbers(40).astype(DTYPES[dtype])
        assert written(path, array, BlockType.Q8_0)[1].type_number == BlockType[kind]
        path.unlink()
