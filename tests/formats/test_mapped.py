"""Tensors mapped from the middle of files: any offset, never past the end, freed when dropped."""

import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.formats.weights import mapped

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


@pytest.fixture
def file(tmp_path):
    """A function that writes an array behind some bytes and gives its place."""

    def write(array, offset):
        path = tmp_path / "numbers.bin"
        path.write_bytes(b"x" * offset + array.tobytes() + b"behind")
        return path

    return write


@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.float16), np.dtype(np.int8)])
@pytest.mark.parametrize("offset", [0, 1, 3, 28, 4095, 4096, 8193])
def test_numbers_are_read_from_any_offset(file, offset, dtype):
    array = np.arange(-7, 8).astype(dtype).reshape(3, 5)
    tensor = mapped(file(array, offset), offset, (3, 5), dtype)
    read = tensor.read()
    assert (read.shape, read.dtype, tensor.nbytes) == ((3, 5), dtype, array.nbytes)
    assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_arrays(file, shape):
    path = file(np.zeros(0, np.float32), 0)
    for content in (b"behind", b""):
        path.write_bytes(content)
        read = mapped(path, len(content), shape, F32).read()
        assert (read.shape, read.dtype) == (shape, F32)


def test_arrays_are_read_only(file):
    read = mapped(file(np.zeros(3, np.float32), 4), 4, (3,), F32).read()
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1


@pytest.mark.parametrize("shape", [(3, 7), (10**12, 10**12), (2**63, 2)])
def test_a_file_that_ends_too_early_is_refused_at_once(file, shape):
    path = file(np.zeros(15, np.float32), 4)
    with pytest.raises(UserError, match="has 70 bytes and should have") as caught:
        mapped(path, 4, shape, F32)
    assert str(path) in str(caught.value)


def test_the_last_byte_must_be_there(tmp_path):
    path = tmp_path / "numbers.bin"
    path.write_bytes(bytes(64))
    assert mapped(path, 4, (15,), F32).read().size == 15
    with pytest.raises(UserError, match="has 64 bytes and should have 65; copy it again"):
        mapped(path, 5, (15,), F32)


def test_a_file_that_shrinks_before_it_is_read_is_refused(file):
    path = file(np.zeros(15, np.float32), 4)
    tensor = mapped(path, 4, (15,), F32)
    path.write_bytes(path.read_bytes()[:63])
    with pytest.raises(UserError, match="has 63 bytes and should have 64"):
        tensor.read()


def test_each_read_maps_the_file_anew(file):
    path = file(np.zeros(15, np.float32), 4)
    tensor = mapped(path, 4, (15,), F32)
    assert tensor.read()[0] == 0
    path.write_bytes(path.read_bytes().replace(b"\0", b"\1"))
    assert tensor.read()[0] != 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_mapping_ends_when_the_array_is_dropped(file):
    path = file(np.zeros(15, np.float32), 3)

    def mappings():
        return Path("/proc/self/maps").read_text().count(str(path))

    gc.disable()  # references alone must do
    try:
        tensor = mapped(path, 3, (15,), F32)
        assert mappings() == 0
        read = tensor.read()
        part = read.reshape(3, 5)[1:].T
        assert mappings() == 1
        del read
        assert mappings() == 1
        del part
        assert mappings() == 0
    finally:
        gc.enable()
