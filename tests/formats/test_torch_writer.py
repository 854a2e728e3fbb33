"""Torch files written without torch."""

import struct

import ml_dtypes
import numpy as np
import pytest
from torch_bytes import NUMBERS, number

from llama_jax.formats.torch import reader as torch_file
from llama_jax.formats.torch import writer as torch_writer
from llama_jax.formats.weights import DTYPES


def write(path, arrays):
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with torch_writer.Writer(path, described) as writer:
        for array in arrays.values():
            writer.add(array)


@pytest.mark.parametrize("max_plain", [2**30, 10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, monkeypatch, dtype, max_plain):
    monkeypatch.setattr(torch_writer, "MAX_PLAIN", max_plain)
    random = np.random.default_rng(0)
    shapes = {"a.weight": (5, 7), "b": (), "é": (3,), "none": (0, 4), "f": (2, 3, 4)}
    arrays = {n: random.standard_normal(s).astype(DTYPES[dtype]) for n, s in shapes.items()}
    arrays["turned"] = arrays["f"].T
    path = tmp_path / "a.pth"
    write(path, arrays)
    content = path.read_bytes()
    for name in ("a.weight", "f"):
        assert content.index(arrays[name].tobytes()) % 64 == 0
    tensors = torch_file.read(path)
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        read = tensors[name].read()
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes()


def test_sizes_beyond_32_bits_are_described():
    pickled = torch_writer.pickled({"a": ((2**17, 2**16), np.dtype(ml_dtypes.bfloat16))})
    assert number(2**33)[:1] == b"\x8a"
    assert pickled.count(b"\x8a\x08" + struct.pack("<q", 2**33)) == 1


def test_the_writer_never_overwrites(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(path, {"a": NUMBERS})
    assert path.read_bytes() == b"mine"
