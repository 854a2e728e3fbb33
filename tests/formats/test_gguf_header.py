"""Headers of GGUF files made by hand, byte for byte; most of them are broken."""

import struct
import time
import tracemalloc

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.formats.gguf.header import read_header

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = np.arange(12, dtype=np.float32)


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def u32(name, value):
    return key(name, U32, struct.pack("<I", value))


def array(name, kind, count, payload):
    return key(name, ARRAY, struct.pack("<IQ", kind, count) + payload)


def tensor(name="a", dims=(4, 3), kind=0, offset=0):
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf(keys=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, counts=(), alignment=32):
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count)
    header += b"".join([*keys, *tensors])
    return header + bytes(-len(header) % alignment) + data


def read(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_header(path)


def test_keys_of_every_type(tmp_path):
    values = {U8: ("B", 200), I8: ("b", -7), U16: ("H", 60_000), I16: ("h", -300)}
    values |= {U32: ("I", 2**32 - 1), I32: ("i", -5), U64: ("Q", 2**63), I64: ("q", -(2**40))}
    values |= {F32: ("f", 1e-5), F64: ("d", 1e-300), BOOL: ("B", True)}
    keys = [key(f"k{kind}", kind, struct.pack(f"<{c}", v)) for kind, (c, v) in values.items()]
    keys += [key("word", STRING, text("naïve ▁")), array("texts", STRING, 2, text("a") + text(""))]
    keys += [array("shorts", I16, 3, struct.pack("<3h", 1, -2, 3)), array("none", F32, 0, b"")]
    found = read(tmp_path, gguf(keys)).keys
    for kind, (_, value) in values.items():
        assert found.values[f"k{kind}"] == value
        assert type(found.values[f"k{kind}"]) is type(value)
    assert found.get("word", str) == "naïve ▁"
    assert found.get("texts", list) == ["a", ""]
    assert found.get("shorts", np.ndarray).tolist() == [1, -2, 3]
    assert found.get("none", np.ndarray).size == 0


@pytest.mark.parametrize("version", [2, 3])
def test_where_tensors_lie(tmp_path, version):
    keys = [u32("general.alignment", 64)]
    tensors = [
        tensor("b", (32,), kind=8, offset=64),
        tensor("a", (4, 3)),
        tensor("c", (2,), 1, 128),
    ]
    data = NUMBERS.tobytes().ljust(64) + bytes(64) + bytes(4)
    content = gguf(keys, tensors, data, version=version, alignment=64)
    found = read(tmp_path, content).tensors
    shapes = {
        name: (stored.shape, stored.type_number, stored.nbytes) for name, stored in found.items()
    }
    assert shapes == {"a": ((3, 4), 0, 48), "b": ((32,), 8, 34), "c": ((2,), 1, 4)}
    start = found["a"].offset
    assert content[start : start + 48] == NUMBERS.tobytes()
    assert (found["b"].offset, found["c"].offset) == (start + 64, start + 128)


def test_tensors_of_unknown_types_are_listed(tmp_path):
    tensors = [
        tensor("a", (256,), kind=999),
        tensor("b", (2,), offset=160),
        tensor("c", (2,), 0, 192),
    ]
    found = read(tmp_path, gguf([], tensors, bytes(224))).tensors
    assert {name: stored.type_number for name, stored in found.items()} == {
        "a": 999,
        "b": 0,
        "c": 0,
    }
    found = read(
        tmp_path, gguf([], [tensor("a"), tensor("b", (256,), 999, 64)], bytes(208))
    ).tensors
    assert [stored.type_number for stored in found.values()] == [0, 999]


TWO = [tensor("a"), tensor("b", offset=64)]
DATA = bytes(128)
BROKEN = {
    "empty": (b"", "is empty"),
    "only the magic": (b"GGUF", "the version would take 4 bytes"),
    "another magic": (gguf(magic=b"ggjt"), "not a GGUF file"),
    "a web page": (b"<!DOCTYPE html>", "a web page"),
    "an archive": (b"PK\3\4" + bytes(60), "a zip archive"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    "version 1": (gguf(version=1), "version 1"),
    "a version to come": (gguf(version=4), "version 4"),
    "version 0": (gguf(version=0), "version 0"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "counts that stop": (gguf()[:20], "the counts"),
    "2^63 tensors": (gguf(counts=(2**63, 0)), "tensors would take"),
    "2^64 - 1 keys": (gguf(counts=(0, 2**64 - 1)), "keys and 0 tensors would take"),
    "one key too many": (gguf([u32("a", 1)], counts=(0, 2)), "the name of a key"),
    "very many keys": (gguf(counts=(0, 70_000), data=bytes(10**6)), "too many"),
    "a key's name of 2^63 bytes": (gguf([struct.pack("<Q", 2**63) + bytes(99)]), "would take"),
    "a string of 2^63 bytes": (gguf([key("a", STRING, struct.pack("<Q", 2**63))]), "would take"),
    "an array of 2^61 numbers": (gguf([array("a", U64, 2**61, b"")], data=DATA), "would take"),
    "an array of 2^60 strings": (gguf([array("a", STRING, 2**60, b"")], data=DATA), "would take"),
    "an array of arrays": (gguf([array("a", ARRAY, 1, bytes(64))]), "array of type 9"),
    "an array of type 13": (gguf([array("a", 13, 1, bytes(64))]), "array of type 13"),
    "a key of type 13": (gguf([key("a", 13, bytes(64))]), "type 13"),
    "a key of type 2^32 - 1": (gguf([key("a", 2**32 - 1, bytes(64))]), "type 4294967295"),
    "a truth of 2": (gguf([key("a", BOOL, b"\2")]), "neither true nor false"),
    "a value cut off": (gguf([key("abcd", U64, b"")], alignment=1), "abcd would take 8"),
    "a key twice": (gguf([u32("a", 1), u32("a", 1)]), "two keys a"),
    "a key without a name": (gguf([u32("", 1)]), "name of a key is ''"),
    "a key of two lines": (gguf([u32("a\nb", 1)]), "name of a key"),
    "a key of 300 bytes": (gguf([u32("a" * 300, 1)]), "name of a key"),
    "a key that is not UTF-8": (gguf([u32(b"a\xff", 1)]), "not UTF-8"),
    "a string that is not UTF-8": (gguf([key("a", STRING, text(b"\xc3"))]), "not UTF-8"),
    "alignment 0": (gguf([u32("general.alignment", 0)]), "power of two"),
    "alignment 48": (gguf([u32("general.alignment", 48)]), "power of two"),
    "alignment 2^31": (gguf([u32("general.alignment", 2**31)]), "power of two"),
    "alignment in words": (
        gguf([key("general.alignment", STRING, text("x"))]),
        "expected an integer",
    ),
    "a tensor twice": (gguf([], [tensor(), tensor(offset=64)], DATA), "two tensors a"),
    "no dims": (gguf([], [tensor(dims=())], DATA), "0 dims"),
    "five dims": (gguf([], [tensor(dims=(1,) * 5)], DATA), "5 dims"),
    "2^32 - 1 dims": (gguf([], [text("a") + struct.pack("<I", 2**32 - 1)], DATA), "dims"),
    "a dim of 0": (gguf([], [tensor(dims=(4, 0))], DATA), "the shape [0, 4]"),
    "dims whose product is 2^64": (gguf([], [tensor(dims=(2**32, 2**32))], DATA), "would end"),
    "a dim of 2^63": (gguf([], [tensor(dims=(2**63, 1))], DATA), "would end"),
    "half a block in a row": (gguf([], [tensor(dims=(48, 2), kind=8)], DATA), "blocks of 32"),
    "an offset not aligned": (gguf([], [tensor(offset=8)], DATA), "the offset 8"),
    "an offset of 2^63": (gguf([], [tensor(offset=2**63)], DATA), "the offset"),
    "a gap": (gguf([], [tensor(), tensor("b", offset=96)], bytes(160)), "b has the offset 96"),
    "tensors on each other": (gguf([], [tensor(), tensor("b")], DATA), "the offset 0"),
    "on each other, types unknown": (
        gguf([], [tensor("a", kind=999), tensor("b"), tensor("c", offset=32)], DATA),
        "c has the offset 32",
    ),
    "too little data": (gguf([], TWO, DATA[:100]), "tensor b would end"),
    "no data": (gguf([], TWO), "tensor a would end"),
    "too much data": (gguf([], TWO, bytes(129)), "goes on for 17 bytes"),
    "a tensor cut off": (gguf([], [tensor()[:-4]], alignment=1), "a would take 8 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers_are_refused_at_no_cost(tmp_path, name):
    content, complaint = BROKEN[name]
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            read(tmp_path, content)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert complaint in message
    assert (
        "model.gguf" in message and "\n" not in message and len(message) < 300 + len(str(tmp_path))
    )
    assert most < 200_000 + 2 * len(content) and time.monotonic() - start < 2


def test_a_whole_file_is_not_refused(tmp_path):
    """What the broken ones above are made from."""
    assert set(read(tmp_path, gguf([u32("a", 1)], TWO, DATA)).tensors) == {"a", "b"}


def test_folders_and_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(UserError, match="is not a file"):
            read_header(path)


@pytest.mark.parametrize("end", range(0, 270, 9))
def test_every_truncation_is_refused(tmp_path, end):
    whole = gguf([u32("a", 1), key("b", STRING, text("c"))], TWO, bytes(112))
    with pytest.raises(UserError):
        read(tmp_path, whole[: min(end, len(whole) - 1)])
