"""llama2.c's int8: the rounding rule, its inverse, and errors."""

import io

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.llama2c import int8 as grouped_int8
from llama_jax.formats.llama2c.int8 import (
    dequantized,
    fitting_group_size,
    quantize,
    quantized_bytes,
    write_quantized,
)


def config(dim, hidden_dim):
    sizes = {"vocab_size": 53, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    return ModelConfig(dim=dim, hidden_dim=hidden_dim, context_length=8, **sizes)


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "requested", "fitting"),
    [
        (288, 768, 64, 32),  # llama2.c's stories15M
        (512, 1376, 64, 32),  # its stories42M, which its own rule gets wrong
        (64, 172, 64, 4),  # its stories260K
        (4096, 11008, 64, 64),
        (48, 40, 48, 1),  # 48, 24, 12, 6, 3, 1
        (48, 40, 8, 8),
        (48, 40, 10**9, 1),
        (22, 33, 1, 1),
    ],
)
def test_the_group_divides_both_lengths_of_rows(dim, hidden_dim, requested, fitting):
    assert fitting_group_size(config(dim, hidden_dim), requested) == fitting


@pytest.mark.parametrize("requested", [0, -1, -64])
def test_group_sizes_below_one_are_refused(requested):
    with pytest.raises(UserError, match=f"group_size={requested} is out of range"):
        fitting_group_size(config(48, 40), requested)


def test_quantising_by_hand():
    groups = np.array([[127, -2.5, 1.5, 0.5], [-254, 3, 1, 2], [0, 0, -0.0, 0]], np.float32)
    values, scales = quantize(groups)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    assert values.tolist() == [[127, -2, 2, 0], [-127, 2, 0, 1], [0, 0, 0, 0]]  # halves to even
    assert scales.tolist() == [1, 2, 0]


def test_scales_below_the_usual_precision_overflow_nothing():
    tiny = np.float32(1e-45)  # the smallest there is
    values, scales = quantize(np.array([[190 * tiny, -190 * tiny], [tiny, -tiny]], np.float32))
    assert values.tolist() == [[127, -127], [0, 0]]
    assert scales.tolist() == [tiny, 0]


def test_a_scale_comes_back_from_the_largest_number_it_makes():
    """Every scale that 127 can divide out, over all numbers between two powers of two."""
    largest = np.arange(2**23, 2**24, dtype=np.int32).astype(np.float32)
    scales = largest / np.float32(127)
    np.testing.assert_array_equal((scales * np.float32(127)) / np.float32(127), scales)


def test_a_scale_that_no_division_makes_may_not_come_back():
    scale = np.float32(2**24 - 64) / 2**24  # its 24 bits are 64 more than a multiple of 128
    values, scales = quantize(np.array([[127 * scale, scale]], np.float32))
    assert values.tolist() == [[127, 1]]
    assert scales[0] != scale


def test_values_are_followed_by_scales():
    file = io.BytesIO()
    write_quantized(file, np.array([[1, -127, 254], [2, 0, 0]], np.float32), 2, "w")
    values = np.array([1, -127, 127, 1, 0, 0], np.int8).tobytes()
    assert file.getvalue() == values + np.array([1, 2, 0], np.float32).tobytes()
    assert quantized_bytes(6, 2) == len(file.getvalue())


@settings(max_examples=80, deadline=None)
@given(
    group=st.integers(1, 9),
    count=st.integers(1, 30),
    at_once=st.integers(1, 50),
    seed=st.integers(0, 99),
    exponent=st.integers(-30, 30),
)
def test_writing_what_was_read_gives_the_same_bytes(
    tmp_path_factory, group, count, at_once, seed, exponent
):
    random = np.random.default_rng(seed)
    array = random.standard_normal((count, group), np.float32) * np.float32(2.0**exponent)
    array[random.random(count) < 0.1] = 0
    path = tmp_path_factory.mktemp("grouped") / "w.bin"
    with pytest.MonkeyPatch.context() as patch, path.open("wb") as file:
        file.write(b"xyz")
        patch.setattr(grouped_int8, "CHUNK", at_once)
        write_quantized(file, array, group, "w")
    tensor = dequantized(path, 3, (group, count), group)
    read = tensor.read()
    assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
    bound = np.abs(array).max(axis=1, keepdims=True) / 254 * (1 + 1e-6)
    assert (np.abs(read.reshape(array.shape) - array) <= bound).all()
    again = io.BytesIO()
    write_quantized(again, read, group, "w")
    assert path.read_bytes() == b"xyz" + again.getvalue()


def test_scales_that_are_nan_or_infinite_are_read(tmp_path):
    path = tmp_path / "w.bin"
    scales = np.array([np.nan, np.inf, 3e38, -1], np.float32)
    path.write_bytes(np.array([1, 0, 127, -128], np.int8).tobytes() + scales.tobytes())
    read = dequantized(path, 0, (4,), 1).read()
    np.testing.assert_array_equal(read, np.array([np.nan, np.nan, np.inf, 128], np.float32))


def test_a_file_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(quantized_bytes(6, 2) - 1))
    with pytest.raises(UserError, match="has 17 bytes and should have 18"):
        dequantized(tmp_path / "w.bin", 0, (6,), 2)
