"""Zips made by hand: whatever is wrong is found before anything of them is used."""

import os
import pickle
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from torch_bytes import NUMBERS, STORED, a_dict, edited, edits, parts, refused, save, tensor, zipped

from llama_jax.errors import UserError
from llama_jax.formats.torch import reader as torch_file


@pytest.fixture
def saved(tmp_path):
    return lambda data: save(tmp_path / "a.pth", data)


def test_entries_of_64_bits(saved):
    path = saved(zipped(parts(), wide=True))
    np.testing.assert_array_equal(torch_file.read(path)["a"].read(), NUMBERS.reshape(4, 6))


@pytest.mark.parametrize("field", ["size", "offset", "stored"])
@pytest.mark.parametrize("value", [2**63, 2**64 - 1, 2**40, 97])
def test_absurd_entries_of_64_bits(saved, field, value):
    entries = parts()
    changes = {field: value} | ({"stored": value} if field == "size" else {})
    entries[2] = (*entries[2][:2], changes)
    refused(saved(zipped(entries, wide=True)))


@pytest.mark.parametrize(
    "end",
    [
        {"size": 2**64 - 1},
        {"size": 0},
        {"start": 2**64 - 1},
        {"start": 3},
    ],
)
def test_absurd_ends_of_64_bits(saved, end):
    refused(saved(zipped(parts(), wide=True, **end)))


@pytest.mark.parametrize("end", [{"size": 2**31}, {"start": 2**31}, {"start": 7}])
def test_absurd_ends(saved, end):
    refused(saved(zipped(parts(), **end)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": 8}, "compressed"),
        ({"flags": 1}, "compressed"),
        ({"stored": 95}, "compressed"),
        ({"size": 2**31, "stored": 2**31}, "should be 2,147,483,648 bytes"),
        ({"size": 97, "stored": 97}, "96 bytes"[:0]),
        ({"offset": 2**31}, "damaged"),
        ({"offset": 1}, "damaged"),
        ({"local": b"r/data/1"}, "damaged"),
    ],
)
def test_contradictory_entries_are_refused(saved, change, word):
    entries = parts()
    entries[2] = (*entries[2][:2], change)
    refused(saved(entries), word)


def test_a_compressed_entry_is_not_inflated(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("r/data.pkl", bytes(50_000_000))
    tracemalloc.start()
    refused(path, "compressed", "not read")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "r/../x",
        "r/data/../../x",
        "/etc/passwd",
        "../data.pkl",
        "./data.pkl",
        "r\\data/1",
        "r/data/1/2",
        "r/data/x",
        "r/code/a.py",
        "data.pkl",
        "r/s/data.pkl",
        b"r\0/data/1",
        b"\xff\xfe",
        "",
        "other/data/1",
        "r/data/-1",
        "r/data/1\n",
    ],
)
def test_strange_names_are_refused(saved, name):
    message = refused(saved([*parts(), (name, b"", {})]))
    assert message.isprintable()


@pytest.mark.parametrize("root", [".", "..", ""])
def test_strange_folders_are_refused(saved, root):
    refused(saved(parts(root=root)), "never writes")


def test_entries_of_one_name_are_refused(saved):
    refused(saved([*parts(), ("r/data/0", bytes(96), {})]), "data/0 twice")


def test_too_many_entries_are_refused(saved):
    many = [(f"r/data/{number}", b"", {}) for number in range(1, 10_000)]
    refused(saved([*parts(), *many]), "10,003 entries")


def test_a_huge_list_of_entries_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_DIRECTORY", 99)
    refused(saved(parts()), "a list of entries of")


@pytest.mark.parametrize("signature", [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6"])
def test_every_signature_is_checked(saved, signature):
    data = zipped(parts(), wide=True)
    refused(saved(data[:4] + data[4:].replace(signature, b"PK\7\7")))


def test_missing_64_bit_fields_are_refused(saved):
    entries = parts()
    lies = {"size": 2**32 - 1, "stored": 2**32 - 1, "extra": b"\1\0\x08\0" + bytes(8)}
    entries[3] = (*entries[3][:2], lies)
    refused(saved(entries))


def test_a_damaged_pickle_is_refused(saved):
    data = zipped(parts())
    place = data.index(b"a" + b"ctorch")
    refused(saved(data[:place] + b"b" + data[place + 1 :]), "damaged in data.pkl")


def test_a_file_without_pickle_is_refused(saved):
    refused(saved(parts()[1:]), "data.pkl")


@pytest.mark.parametrize("order", [b"big", b"bigbig", b"little ", b""])
def test_big_endian_files_are_refused(saved, order):
    entries = parts()
    entries[1] = ("r/byteorder", order, {})
    refused(saved(entries), "little-endian")


def test_files_without_byte_order_or_checksums_are_read(saved):
    entries = [(name, data, {"crc": 0}) for name, data, _ in parts() if "byteorder" not in name]
    array = torch_file.read(saved(entries))["a"].read()
    np.testing.assert_array_equal(array, NUMBERS.reshape(4, 6))


@pytest.mark.parametrize("strides", [(6, 1), (1, 4)])
def test_damaged_numbers_are_found_when_read(saved, strides):
    data = zipped(parts(a_dict(a=tensor(strides=strides))))
    place = data.index(STORED) + 50
    path = saved(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    lazy = torch_file.read(path)["a"]
    for _ in range(2):
        with pytest.raises(UserError, match="data/0; copy it again"):
            lazy.read()


def test_a_file_that_shrinks_is_found_when_read(saved):
    entries = [(name, data, {"crc": 0}) for name, data, _ in parts()]
    path = saved(entries)
    lazy = torch_file.read(path)["a"]
    os.truncate(path, 300)
    with pytest.raises(UserError, match="copy it again"):
        lazy.read()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-LFS pointer"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "newer torch"),
        (b"GGUF\3\0\0\0" * 9, "is a GGUF file"),
        (b"PK", "torch.save"),
        (b"PK\3\4", "cut short"),
    ],
)
def test_other_files_are_recognised(saved, data, word):
    refused(saved(data), word)


def test_an_old_tar_is_recognised(tmp_path):
    (tmp_path / "storages").write_bytes(b"abc")
    with tarfile.open(tmp_path / "a.pth", "w") as file:
        file.add(tmp_path / "storages", "storages")
    refused(tmp_path / "a.pth", "newer torch")


def test_folders_and_absent_files_are_refused(tmp_path):
    refused(tmp_path, "not a file")
    refused(tmp_path / "b.pth", "not a file")


def test_every_truncation_is_found(saved):
    whole = zipped(parts())
    for length in range(0, len(whole), 3):
        refused(saved(whole[:length]))


GOOD = zipped(parts())
WIDE = zipped(parts(), wide=True)


@pytest.mark.parametrize("good", [GOOD, WIDE], ids=["plain", "wide"])
@given(edits=edits)
@settings(max_examples=60, deadline=None)
def test_an_edited_file_is_refused_or_right(tmp_path_factory, good, edits):
    path = tmp_path_factory.getbasetemp() / "edited.pth"
    path.write_bytes(edited(good, edits))
    try:
        array = torch_file.read(path)["a"].read()
    except UserError as error:
        assert "\n" not in str(error)
        return
    np.testing.assert_array_equal(array, NUMBERS.reshape(4, 6))
