"""Safetensors files, made byte by byte."""

import copy
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.formats.huggingface import safetensors as safetensors_file
from llama_jax.formats.weights import Tensor

FLOATS = np.array([[1.5, -2.0, 3.25], [0.0, np.inf, 7.0]], np.float32)
BFLOATS = np.array([1.0, -0.5, 3.0], ml_dtypes.bfloat16)
HEADER = {
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]},
    "steps": {"dtype": "I64", "shape": [], "data_offsets": [30, 38]},  # not at a multiple of 8
    "none": {"dtype": "F16", "shape": [4, 0], "data_offsets": [38, 38]},
}
DATA = FLOATS.tobytes() + BFLOATS.tobytes() + np.int64(77).tobytes()


def whole(header=HEADER, data=DATA):
    """The bytes of a file; a header may be given as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def edited(name, **changes):
    """The header with other fields of one tensor."""
    header = copy.deepcopy(HEADER)
    header[name] |= changes
    return header


def test_tensors_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole({"__metadata__": {"format": "pt"}} | HEADER))
    tensors = safetensors_file.read(path)
    assert list(tensors) == list(HEADER)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    assert arrays["a.weight"].dtype == np.float32 and (arrays["a.weight"] == FLOATS).all()
    assert arrays["b"].dtype == ml_dtypes.bfloat16 and (arrays["b"] == BFLOATS).all()
    assert arrays["steps"].shape == () and arrays["steps"] == 77
    assert arrays["none"].shape == (4, 0) and arrays["none"].dtype == np.float16


def test_any_order_padding_and_no_tensor_at_all_are_fine(tmp_path):
    path = tmp_path / "a.safetensors"
    text = json.dumps(dict(reversed(HEADER.items()))).encode() + b"   "
    path.write_bytes(whole(text))
    assert (safetensors_file.read(path)["a.weight"].read() == FLOATS).all()
    path.write_bytes(whole({}, b""))
    assert safetensors_file.read(path) == {}


def test_a_file_is_laid_out_as_the_format_says(tmp_path):
    path, log = tmp_path / "a.safetensors", []

    def tensor(name, array):
        return Tensor(array.shape, array.dtype, lambda: (log.append(name), array)[1])

    tensors = {"b": tensor("b", BFLOATS), "a": tensor("a", FLOATS.T)}
    safetensors_file.write(path, tensors, report=log.append)
    assert log == ["a", 24, "b", 30]  # the wider dtype first, so that it is aligned
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},'
        b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header
    assert path.read_bytes() == expected + FLOATS.T.tobytes() + BFLOATS.tobytes()
    with pytest.raises(FileExistsError):
        safetensors_file.write(path, tensors)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"ü.x": np.arange(6, dtype=np.float16).reshape(1, 2, 3), "empty": np.ones((0, 5))}
    arrays |= {"scalar": np.float32(2.5)[None][0].reshape(()), "b": BFLOATS}
    lazy_tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    safetensors_file.write(path, lazy_tensors)
    tensors = safetensors_file.read(path)
    for name, array in arrays.items():
        back = tensors[name].read()
        assert (back.dtype, back.shape, back.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )


PAIR = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}
REFUSED = {
    "empty": (b"", "empty"),
    "five bytes": (b"\x01\0\0\0\0", "not safetensors"),
    "header longer than the file": ((500).to_bytes(8, "little") + b"{}", "500 bytes, the file has"),
    "header that ends with the file": (whole(data=b"")[:-1], "not safetensors"),
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "9,223,372,036,854,775,808"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "not JSON": (whole(b'{"a": '), "not JSON"),
    "not UTF-8": (whole(b'{"\xff": 1}'), "not JSON"),
    "space before": (whole(b' {"a": 1}'), "no JSON object"),
    "a list": (whole(b"[1, 2]"), "no JSON object"),
    "deep": (whole(b'{"a":' + b"[" * 100_000), "nested"),
    "NaN": (whole(b'{"a": NaN}'), "NaN is not a number"),
    "number of 10,000 digits": (whole(b'{"a": 1' + b"0" * 10_000 + b"}"), "not JSON"),
    "a name twice": (whole(b'{"b": 1, "b": 2}'), "'b' occurs twice"),
    "a field twice": (whole(b'{"b": {"dtype": 1, "dtype": 2}}'), "'dtype' occurs twice"),
    "metadata of numbers": (whole({"__metadata__": {"a": 1}} | HEADER), "__metadata__"),
    "metadata in a list": (whole({"__metadata__": []} | HEADER), "__metadata__"),
    "no fields": (whole({"a": {}}, b""), "'a' has {}"),
    "not an object": (whole({"a": 3}, b""), "'a' has 3"),
    "another field": (whole(edited("b", more=1)), "expected dtype, shape, data_offsets"),
    "unknown dtype": (whole(edited("b", dtype="F4")), "dtype 'F4'"),
    "dtype in a list": (whole(edited("b", dtype=["BF16"])), "dtype"),
    "shape as a number": (whole(edited("b", shape=3)), "shape 3"),
    "negative size": (whole(edited("b", shape=[-1, -3])), r"shape \[-1, -3\]"),
    "size of 3.0": (whole(edited("b", shape=[3.0])), r"shape \[3.0\]"),
    "size of true": (whole(edited("b", shape=[True, 3])), "shape"),
    "another size": (whole(edited("b", shape=[4])), "not its size"),
    "product that overflows": (whole(edited("b", shape=[2**32, 2**32, 2**30])), "not its size"),
    "absurd but empty": (whole(edited("none", shape=[2**40, 2**40, 0])), "not its size"),
    "absurd and empty": (whole(edited("none", shape=[10**400, 0])), "not its size"),
    "too many dims": (whole(edited("b", shape=[3] + [1] * 40)), "at most 32 sizes"),
    "three offsets": (whole(edited("b", data_offsets=[24, 30, 30])), "data_offsets"),
    "backwards": (whole(edited("b", data_offsets=[30, 24])), "not its size"),
    "negative offset": (whole(edited("a.weight", data_offsets=[-24, 0])), "data_offsets"),
    "overlap": (whole(edited("b", data_offsets=[18, 24])), "gap or an overlap"),
    "gap": (whole(edited("b", data_offsets=[25, 31])), "gap or an overlap"),
    "trailing byte": (whole() + b"!", "39 bytes of tensors, its header says 38"),
    "cut short": (whole()[:-1], "37 bytes of tensors, its header says 38"),
    "line break in a name": (whole({"a\nb": PAIR}, b"xy"), r"named 'a\\nb'"),
    "half a surrogate in a name": (whole({"\ud800": PAIR}, b"xy"), r"named '\\ud800'"),
    "name of a million letters": (whole({"a" * 10**6: PAIR}, b"xy"), "named 'aaa"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_files_are_refused_in_a_line(name, tmp_path):
    data, reason = REFUSED[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        safetensors_file.read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500
    message.encode()


def test_a_header_above_the_formats_limit_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # sparse
    with pytest.raises(UserError, match="header would have 100,000,001 bytes"):
        safetensors_file.read(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is not a file"):
            safetensors_file.read(path)


def test_a_file_cut_after_it_was_read_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole())
    tensors = safetensors_file.read(path)
    path.write_bytes(whole()[:-20])
    with pytest.raises(UserError, match="copy it again"):
        tensors["b"].read()


def assert_refused_or_right(path, data):
    """Read bytes: an error of one line, or tensors that are exactly the file's."""
    path.write_bytes(data)
    try:
        tensors = safetensors_file.read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    size = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys()
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        array = tensor.read()
        assert array.shape == tensor.shape == tuple(header[name]["shape"])
        assert array.dtype == tensor.dtype
        assert array.tobytes() == numbers[begin:end]
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(numbers)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_right(tmp_path_factory, changes):
    data = bytearray(whole())
    for place, byte in changes:
        data[place % len(data)] = byte
    assert_refused_or_right(tmp_path_factory.getbasetemp() / "changed_safetensors", bytes(data))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.binary(max_size=9), st.integers(0, 30))
def test_missing_and_inserted_bytes_are_refused_or_right(tmp_path_factory, place, new, missing):
    data = whole()
    place %= len(data)
    data = data[:place] + new + data[place + missing :]
    assert_refused_or_right(tmp_path_factory.getbasetemp() / "changed_safetensors", data)


NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.0, True, None])
VALUES = NUMBERS | st.lists(NUMBERS, max_size=3) | st.sampled_from(["F32", "BF16", "U8", "x", {}])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(HEADER)),
    st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
    VALUES,
    st.booleans(),
)
def test_changed_fields_are_refused_or_right(tmp_path_factory, name, field, value, renamed):
    header = copy.deepcopy(HEADER)
    header[name][field] = value
    if renamed:
        header["a\u2028"] = header.pop(name)
    assert_refused_or_right(tmp_path_factory.getbasetemp() / "changed_safetensors", whole(header))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["F32", "F16", "BF16", "U8"]),
            st.lists(st.integers(0, 4), max_size=3),
            st.integers(-1, 1) | st.just(0),
        ),
        max_size=4,
    )
)
def test_random_headers_are_refused_or_right(tmp_path_factory, entries):
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
    header, end = {}, 0
    for number, (dtype, shape, slip) in enumerate(entries):
        begin = end + slip
        end = begin + math.prod(shape) * sizes[dtype]
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    data = whole(header, bytes(range(max(end, 0) % 256)) if end < 256 else bytes(end))
    assert_refused_or_right(tmp_path_factory.getbasetemp() / "changed_safetensors", data)


def test_the_message_names_the_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole(edited("b", shape=[4])))
    with pytest.raises(UserError, match=re.escape(f"{path}: tensor 'b' is BF16 of shape [4]")):
        safetensors_file.read(path)
