"""Torch files against torch: what torch saves we read, and what we write torch reads safely."""

import numpy as np
import pytest

from llama_jax.formats.torch import reader as torch_file
from llama_jax.formats.torch import writer as torch_writer
from llama_jax.formats.weights import DTYPES

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

TORCH_DTYPES = ["float32", "float16", "bfloat16", "float64"]
TORCH_DTYPES += ["int64", "int32", "int16", "int8", "uint8"]


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def saved(tensors, path):
    torch.save(tensors, path)
    return torch_file.read(path)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_reads_what_torch_saves(tmp_path, dtype):
    random = torch.Generator().manual_seed(0)
    base = (torch.randn(5, 7, 3, generator=random) * 50).to(getattr(torch, dtype))
    theirs = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "part": base[1:4, 2:6:2],
        "column": base[:, 3:4, 1],
        "scalar": base[2, 3, 1],
        "empty": base[:0],
    }
    ours = saved(theirs, tmp_path / "a.pth")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        array = ours[name].read()
        assert array.dtype.name == dtype
        assert array.shape == ours[name].shape == tuple(tensor.shape)
        assert array.tobytes() == as_bytes(tensor), name


def test_reads_booleans_parameters_and_state_dicts(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2, bias=False))
    module.register_buffer("mask", torch.tensor([True, False, True]))
    for tensors in (module.state_dict(), dict(module.named_parameters())):
        ours = saved(tensors, tmp_path / "a.pth")
        assert ours.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(ours[name].read(), tensor.detach().numpy())


def test_reads_files_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        ours = saved({"a": torch.arange(5)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(ours["a"].read(), np.arange(5))


def test_a_file_of_the_time_before_zip_is_refused_with_advice(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(torch_file.UserError, match=r"torch\.save it again"):
        torch_file.read(tmp_path / "a.pth")


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_what_we_write(tmp_path, dtype, mmap):
    random = np.random.default_rng(0)
    arrays = {
        name: random.standard_normal(shape).astype(DTYPES[dtype])
        for name, shape in {"é.weight": (5, 7), "one": (3,), "none": (0, 2), "": ()}.items()
    }
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with torch_writer.Writer(tmp_path / "a.pth", described) as writer:
        for array in arrays.values():
            writer.add(array)
    theirs = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
    assert list(theirs) == list(arrays)
    for name, array in arrays.items():
        assert theirs[name].dtype == getattr(torch, dtype)
        assert tuple(theirs[name].shape) == array.shape
        assert as_bytes(theirs[name]) == array.tobytes()
        assert not mmap or theirs[name].data_ptr() % 64 == 0
