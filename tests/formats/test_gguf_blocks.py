"""Blocks of quantised numbers, against those of the `gguf` package."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from llama_jax.formats.gguf import blocks as gguf_blocks
from llama_jax.formats.gguf.blocks import BF16, F16, F32, Q8_0, TYPES, stored, type_name, unpacked
from llama_jax.formats.weights import DTYPES, Tensor

ROWS, COLUMNS = 7, 96


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last not full."""
    monkeypatch.setattr(gguf_blocks, "CHUNK", 4)


def numbers(columns=COLUMNS):
    """Rows of many magnitudes, with a block of zeros and one of exact halves of a level."""
    random = np.random.default_rng(3)
    array = random.standard_normal((ROWS, columns)).astype(np.float32)
    array *= np.float32(10.0) ** np.arange(-3, 4, dtype=np.float32)[:, None]
    array[0, :32] = 0
    array[1, :32] = (np.arange(32, dtype=np.float32) - 15.5) * 2
    array[1, 0] = 127
    return array


def promise(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def read_back(raw, kind, shape):
    return unpacked(promise(raw.reshape(-1, kind.nbytes)), shape, kind).read()


def test_q8_0_is_ggmls():
    array = numbers()
    raw = stored(array, Q8_0)
    expected = quants.quantize(array, GGMLQuantizationType.Q8_0)
    assert raw.tobytes() == expected.tobytes()
    back = read_back(raw, Q8_0, array.shape)
    theirs = quants.dequantize(expected, GGMLQuantizationType.Q8_0)
    assert back.tobytes() == theirs.tobytes()


def test_q8_0_errs_by_half_a_level():
    array = numbers()
    error = np.abs(read_back(stored(array, Q8_0), Q8_0, array.shape) - array).reshape(-1, 32)
    level = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True) / 127
    assert (error <= level * (0.5 + 127 * 2**-11) + 2**-25 * 127).all()
    assert error.max() > 0.3 * level.max(), "rounding is what it errs by"


@pytest.mark.parametrize("number", [2, 8, 14])
def test_unpacking_any_bytes_is_ggmls(number):
    kind, shape = TYPES[number], (ROWS, 512)
    raw = np.random.default_rng(number).integers(0, 256, (ROWS, 512 // kind.count, kind.nbytes))
    raw = raw.astype(np.uint8)
    at = 208 if number == 14 else 0
    scales = np.random.default_rng(1).standard_normal(raw.shape[:2]).astype(np.float16)
    raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    expected = quants.dequantize(raw.reshape(ROWS, -1), GGMLQuantizationType(number))
    found = read_back(raw, kind, shape)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_q4_0_errs_by_one_level():
    array = numbers()
    raw = quants.quantize(array, GGMLQuantizationType.Q4_0)
    error = np.abs(read_back(raw, TYPES[2], array.shape) - array).reshape(-1, 32)
    level = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True) / 8
    assert (error <= level * (1 + 8 * 2**-11)).all()


@pytest.mark.parametrize("kind", [F32, F16, BF16])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_floats_are_rounded_as_numpy_does(kind, dtype):
    array = numbers().astype(dtype)
    assert stored(array, kind).tobytes() == array.astype(kind.dtype).tobytes()


@pytest.mark.parametrize("kind", [F16, Q8_0])
@pytest.mark.parametrize("value", [2.0**24, np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_does_not_fit_is_an_error(kind, value, dtype):
    array = numbers().astype(DTYPES[dtype])
    array[5, 40] = value
    with pytest.raises(OverflowError):
        stored(array, kind)


def test_infinities_go_where_they_came_from():
    array = numbers().astype(np.float16)
    array[5, 40:42] = np.inf, np.nan
    assert stored(array, F16).tobytes() == array.tobytes()
    assert np.isnan(stored(array, F32).view(np.float32)).sum() == 1


def test_tiny_numbers_become_zero():
    array = np.full((1, 32), 1e-44, np.float32)
    with np.errstate(all="ignore", invalid="raise"):  # no infinity on the way, nor 0 times one
        assert not Q8_0.pack(array).any()


def test_names_are_ggmls():
    for member in GGMLQuantizationType:
        assert type_name(member) in (member.name, f"type {int(member)}")
    assert type_name(12) == "Q4_K"
    assert {type_name(number) for number in TYPES} == {k.name for k in TYPES.values()}
    for number, kind in TYPES.items():
        assert (kind.count, kind.nbytes) == quants.GGML_QUANT_SIZES[GGMLQuantizationType(number)]
