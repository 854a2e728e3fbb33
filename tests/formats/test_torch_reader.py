"""Tensors in torch files: any view of a storage, and none beyond it."""

import pickle

import numpy as np
import pytest
from torch_bytes import (
    NUMBERS,
    a_dict,
    parts,
    refused,
    save,
    tensor,
    text,
)

from llama_jax.formats.torch import reader as torch_file


@pytest.fixture
def saved(tmp_path):
    return lambda data: save(tmp_path / "a.pth", data)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4, 6), (6, 1), 0),
        ((6, 4), (1, 6), 0),
        ((2, 3), (12, 2), 1),
        ((3, 2, 4), (8, 4, 1), 0),
        ((4, 2, 3), (1, 12, 4), 0),
        ((1, 5, 1), (99, 2, 2**62), 13),
        ((), (), 23),
        ((24,), (1,), 0),
    ],
)
def test_any_view_of_a_storage(saved, shape, strides, offset):
    path = saved(parts(a_dict(a=tensor(shape, strides, offset))))
    (lazy,) = torch_file.read(path).values()
    expected = np.zeros(shape, np.float32)
    for place in np.ndindex(shape):
        expected[place] = NUMBERS[offset + sum(i * s for i, s in zip(place, strides))]
    array = lazy.read()
    assert lazy.shape == array.shape == shape
    assert lazy.dtype == array.dtype == np.float32
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("kind", "dtype"), torch_file.STORAGES.items())
def test_every_kind_of_number(saved, kind, dtype):
    array = (np.arange(9) % 2 if dtype == np.bool_ else np.arange(9) * 3).astype(dtype)
    path = saved(parts(a_dict(a=tensor((3, 2), (3, 2), kind=kind, count=9)), array.tobytes()))
    read = torch_file.read(path)["a"].read()
    assert read.dtype == dtype
    expected = [[array[3 * row + 2 * column] for column in range(2)] for row in range(3)]
    assert read.tobytes() == np.array(expected, dtype).tobytes()


def test_an_empty_tensor(saved):
    path = saved(parts(a_dict(a=tensor((0, 7), (7, 1), count=0)), b""))
    assert torch_file.read(path)["a"].read().shape == (0, 7)


def test_one_storage_under_two_names_and_a_parameter(saved):
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88}tR"
    hooks = b"ccollections\nOrderedDict\n)R"
    path = saved(parts(a_dict(a=tensor(hooks=hooks), b=parameter)))
    for lazy in torch_file.read(path).values():
        np.testing.assert_array_equal(lazy.read(), NUMBERS.reshape(4, 6))


def test_other_data_is_parsed_and_refused(saved):
    plain = {"i": [1, -1, 300, 70000, -(2**40), 2**70], "f": 2.5, "n": None, "t": (True, False)}
    plain |= {"one": (1,), "two": (1, "é"), "three": (1, 2, 3), "none": (), "steps": {0: 1}}
    whole = pickle.dumps(plain, 2)
    path = saved(parts(whole[:-1] + text("model") + a_dict(a=tensor())[2:-1] + b"s."))
    refused(path, "'i'", "list", "nothing else")


def test_attributes_of_a_state_dict_are_dropped(saved):
    pickled = a_dict(a=tensor())[:-1] + b"}" + text("_metadata") + b"}sb."
    assert list(torch_file.read(saved(parts(pickled)))) == ["a"]


@pytest.mark.parametrize(
    "view",
    [
        {"shape": (5, 6)},
        {"offset": 1},
        {"offset": 24, "shape": (1,), "strides": (1,)},
        {"shape": (4, 7), "strides": (6, 1)},
        {"offset": -1},
        {"shape": (4, 6), "strides": (-6, 1), "offset": 18},
        {"shape": (-4, 6)},
        {"shape": (2**62, 2**62), "strides": (0, 0)},
        {"shape": (5, 5), "strides": (0, 0)},
        {"shape": (2,), "strides": (2**64,)},
        {"shape": (2, 2), "strides": (2**62, 2**62)},
        {"shape": (0, 2**62), "strides": (1, 1)},
        {"shape": (2.0,), "strides": (1,)},
        {"shape": (True,), "strides": (1,)},
        {"shape": (4,)},
        {"shape": (1,) * 17, "strides": (1,) * 17},
        {"count": 23},
        {"count": 2**62},
        {"count": -24},
        {"key": "1"},
        {"key": "../0"},
        {"kind": "Double"},
    ],
)
def test_views_beyond_their_storage_are_refused(saved, view):
    refused(saved(parts(a_dict(a=tensor(**view)))))


def test_a_storage_of_two_dtypes_is_refused(saved):
    refused(saved(parts(a_dict(a=tensor(), b=tensor(kind="Int")))), "int32", "float32")
