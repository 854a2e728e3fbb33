"""Headers of llama2.c files: every broken one is refused in one line, without cost."""

import struct
import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from llama2c_files import SIZES, arrays, header, version0, version1, version2

from llama_jax.errors import UsageError, UserError
from llama_jax.formats.llama2c.header import pack_header, read_header
from llama_jax.formats.llama2c.model import read

FILES = [version0(arrays()), version0(arrays(tied=False)), version1(arrays())]
FILES += [version1(arrays(tied=False)), version2(arrays(), 8)[0]]
EXTREMES = (-(2**31), -1, 0, 1, 2, 7, 64, 2**16, 2**24, 2**30, 2**31 - 1)


def refused(path, content):
    """The complaint about a file of this content."""
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert not isinstance(caught.value, UsageError)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_headers_come_back(tmp_path, version, tied):
    made = arrays(tied=tied)
    file = [version0(made), version1(made), version2(made, 8)[0]][version]
    (tmp_path / "x.bin").write_bytes(file)
    found = read_header(tmp_path / "x.bin")
    assert (found.version, found.group_size) == (version, 8 if version == 2 else 1)
    packed = pack_header(found.config, version, found.group_size)
    assert packed == header(version, SIZES, tied, 8)
    assert len(packed) == (28 if version == 0 else 256)


@pytest.mark.parametrize("change", [-4, -1, 1, 4, 1000])
@pytest.mark.parametrize("file", range(len(FILES)))
def test_a_file_of_another_length_is_refused_with_both(tmp_path, file, change):
    content = FILES[file]
    changed = content[:change] if change < 0 else content + bytes(change)
    message = refused(tmp_path / "x.bin", changed)
    assert f"has {len(changed):,} bytes" in message
    assert f"has {len(content):,}; copy it again" in message


@pytest.mark.parametrize("size", [1, 4, 27, 28, 29, 100, 255, 256])
@pytest.mark.parametrize("file", range(len(FILES)))
def test_a_file_that_ends_in_or_at_its_header_is_refused(tmp_path, file, size):
    message = refused(tmp_path / "x.bin", FILES[file][:size])
    assert "has only" in message or "cut short" in message or "copy it again" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a llama2.c model but empty; copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-LFS pointer; run `git"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "but a web page; download the file"),
        (b"PK\x03\x04" + bytes(60), "but a zip archive, as PyTorch's files are"),
        (b"GGUF\x03\0\0\0" + bytes(60), "but a GGUF file"),
        (b"Once upon a time there was a text of some length", "out of range"),
        (bytes(400), "dim=0, hidden_dim=0, n_layers=0"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, content, message):
    assert message in refused(tmp_path / "x.bin", content)


def test_a_dim_that_looks_like_a_web_page_is_read(tmp_path):
    sizes = SIZES | {"dim": 60}  # which is "<"
    (tmp_path / "x.bin").write_bytes(version0(arrays(sizes | {"n_heads": 6}), sizes))
    assert read(tmp_path / "x.bin").config.dim == 60


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.bin does not exist; expected a llama2\.c model"):
        read(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"is a folder; expected a llama2\.c model"):
        read(tmp_path)


@pytest.mark.parametrize("version", [0, 3, 77, -1])
def test_unknown_versions_are_refused(tmp_path, version):
    content = FILES[2][:4] + struct.pack("<i", version) + FILES[2][8:]
    message = refused(tmp_path / "x.bin", content)
    assert f"is of llama2.c's version {version}; expected 0, 1 or 2" in message


@pytest.mark.parametrize("flag", [2, 255])
def test_a_flag_other_than_0_and_1_is_refused(tmp_path, flag):
    content = FILES[2][:36] + bytes([flag]) + FILES[2][37:]
    assert f"byte 36 is {flag}; expected 0 or 1" in refused(tmp_path / "x.bin", content)


@pytest.mark.parametrize("group", [0, -1, -64, -(2**31), 7, 64, 2**31 - 1])
def test_another_group_size_is_refused(tmp_path, group):
    content = FILES[4][:37] + struct.pack("<i", group) + FILES[4][41:]
    message = refused(tmp_path / "x.bin", content)
    assert f"group_size={group}" in message
    assert "out of range" in message if group < 1 else "copy it again" in message


@pytest.mark.parametrize("group", [7, 32, 80, 4096])
def test_a_group_size_that_does_not_divide_is_refused(tmp_path, group):
    D, F, L, _, _, V, _ = SIZES.values()
    in_matrices = V * D + L * (2 * D * D + 2 * 16 * D + 3 * D * F)
    size = 256 + in_matrices + 4 * (in_matrices // group) + 4 * (2 * L * D + D)
    content = header(2, SIZES, True, group).ljust(size, b"\0")
    message = refused(tmp_path / "x.bin", content)
    assert "has a group size that does not divide every matrix" in message
    assert f"group_size={group}" in message


@pytest.mark.parametrize("number", EXTREMES)
@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("file", [0, 2, 4])
def test_an_absurd_number_costs_nothing(tmp_path, file, field, number):
    start = (0 if file == 0 else 8) + 4 * list(SIZES).index(field)
    content = FILES[file][:start] + struct.pack("<i", number) + FILES[file][start + 4 :]
    if file != 0 and field == "max_seq_len" and 1 <= number <= 2**24:
        return  # only the first version's length depends on it
    if (field, number) == ("n_kv_heads", 2):
        return  # what it was
    tracemalloc.start()
    try:
        message = refused(tmp_path / "x.bin", content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(number) in message or str(abs(number)) in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5, "n_kv_heads": 5}, "model.dim=48 does not divide into model.num_heads=5"),
        ({"n_heads": 16, "n_kv_heads": 16}, "model.head_dim=3 is odd"),
        ({"n_heads": 6, "n_kv_heads": 4}, "does not divide over model.num_kv_heads=4"),
    ],
)
def test_invalid_heads_are_refused(tmp_path, changes, message):
    sizes = SIZES | changes
    D, F, L, N, K, V, _ = sizes.values()
    count = V * D + 2 * L * D + D + L * (2 * D * D + 2 * K * (D // N) * D + 3 * D * F)
    content = header(1, sizes, True) + bytes(4 * count)
    assert message in refused(tmp_path / "x.bin", content)


def test_layers_beyond_any_model_are_refused(tmp_path):
    sizes = dict.fromkeys(SIZES, 1) | {"dim": 2, "n_layers": 1001}  # 104 bytes each
    assert "n_layers=1001 out of range" in refused(tmp_path / "x.bin", header(1, sizes, True))


@settings(max_examples=100, deadline=None)
@given(
    content=st.sampled_from(FILES),
    changes=st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from(EXTREMES) | st.integers(1, 100)), max_size=3
    ),
    flips=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=2),
    length=st.none() | st.integers(0, 30_000),
)
def test_a_changed_file_is_refused_or_read_right(tmp_path_factory, content, changes, flips, length):
    path = tmp_path_factory.mktemp("changed") / "x.bin"
    changed = bytearray(content)
    for word, number in changes:
        struct.pack_into("<i", changed, 4 * word, number)
    for place, byte in flips:
        changed[place] = byte
    path.write_bytes(bytes(changed[:length]))
    try:
        weights = read(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    size = 0
    for tensor in weights.tensors.values():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, np.float32)
        size += array.size
    assert size <= path.stat().st_size
