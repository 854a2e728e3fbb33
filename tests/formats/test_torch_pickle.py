"""Pickles made by hand: data is read, code is refused by name and not run."""

import os
import pickle
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_bytes import (
    a_dict,
    edited,
    edits,
    number,
    numbers,
    parts,
    refused,
    save,
    tensor,
    text,
    zipped,
)

from llama_jax.errors import UserError
from llama_jax.formats.torch import reader as torch_file


@pytest.fixture
def saved(tmp_path):
    return lambda data: save(tmp_path / "a.pth", data)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("nested", [False, True])
def test_code_is_refused_by_name_and_not_run(saved, tmp_path, nested):
    trace = tmp_path / "it was run"
    evil = Evil(os.system, (f"touch '{trace}'",))
    path = saved(parts(pickle.dumps({"a": evil} if nested else evil, 2)))
    refused(path, "posix.system", "nothing of it was run")
    assert not trace.exists()
    pickle.loads(pickle.dumps(evil, 2))
    assert trace.exists()


STRANGERS = ["builtins\neval", "torch\nload", "torch\nFloatStorage.x", "os\nsystem", "\n", "\x1b\n"]


@pytest.mark.parametrize("name", STRANGERS)
def test_any_other_name_is_refused(saved, name):
    message = refused(saved(parts(b"\x80\x02c" + name.encode() + b"\n.")), "nothing of it was run")
    assert message.isprintable()


@pytest.mark.parametrize(
    "pickled",
    {
        "empty": b"",
        "no stop": b"\x80\x02}",
        "nothing": b"\x80\x02.",
        "a function to fill": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "items of a function": b"\x80\x02ccollections\nOrderedDict\n(" + text("a") + b"Nu.",
        "a call of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a dict with arguments": b"\x80\x02ccollections\nOrderedDict\n(](K\1K\2eltR.",
        "an OrderedDict of something": b"\x80\x02ccollections\nOrderedDict\n(]tR.",
        "no tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\1K\2K\3K\4K\5K\6tR.",
        "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "no parameter": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\1K\2K\3tR.",
        "a persistent number": b"\x80\x02K\1Q.",
        "a persistent tuple": b"\x80\x02(K\1K\2K\3K\4K\5tQ.",
        "a storage of no kind": b"\x80\x02(" + text("storage") + b"K\2" + text("0") + b"K\4K\5tQ.",
        "a key that is a list": b"\x80\x02}]Ns.",
        "a large key": b"\x80\x02}" + number(2**31) + b"Ns.",
        "a key without value": b"\x80\x02}(" + text("a") + b"u.",
        "no mark": b"\x80\x02K\1t.",
        "nothing stored": b"\x80\x02h\7.",
        "storing nothing": b"\x80\x02q\7.",
        "a number cut short": b"\x80\x02J\1\2",
        "a bad text": b"\x80\x02X\1\0\0\0\xff.",
        "a huge text": b"\x80\x02X\xff\xff\xff\xffabc.",
        "a huge number": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
        "a long name": b"\x80\x02c" + b"a" * 5000 + b"\nb\n.",
        "a tensor of too many facts": b"\x80\x02" + tensor()[:-2] + b"NNtR.",
        "a tensor of too few facts": b"\x80\x02" + tensor(hooks=b"")[:-2] + b"tR.",
        "a wrong append": b"\x80\x02}Na.",
        "a wrong extend": b"\x80\x02}(Ne.",
        "an old protocol": pickle.dumps({}, 0),
        "a new protocol": pickle.dumps({}, 4),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_broken_pickles_are_refused(saved, pickled):
    refused(saved(parts(pickled[1])))


@pytest.mark.parametrize("pickled", [b"\x80\x02].", a_dict()[:-2] + b"K\1" + tensor() + b"u."])
def test_other_things_than_tensors_by_name_are_refused(saved, pickled):
    refused(saved(parts(pickled)), "expected tensors by name")


@pytest.mark.parametrize(
    "pickled",
    {
        "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "nested tuples": b"\x80\x02N" + b"\x85" * 200_000 + b".",
        "itself": b"\x80\x02}q\0(" + text("a") + b"h\0u.",
        "marks": b"\x80\x02" + b"(" * 600_000,
        "dicts": b"\x80\x02" + b"}" * 600_000 + b"].",
        "a far memo": b"\x80\x02Nr\xff\xff\xff\xff" * 1000 + b".",
        "doubled tuples": b"\x80\x02)" + b"q\0h\0\x86" * 50_000 + b".",
        "a called giant": b"\x80\x02("
        + b"N" * 200_000
        + b"tq\0ccollections\nOrderedDict\nq\1"
        + b"h\1h\0R" * 100_000
        + b".",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_hostile_pickles_are_cheap(saved, pickled):
    path = saved(parts(pickled[1]))
    tracemalloc.start()
    started = time.process_time()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert time.process_time() - started < 20


def test_a_huge_pickle_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 99)
    refused(saved(parts()), "data.pkl", "not read")


def load_or_refuse(path, pickled):
    """Read every tensor, none of which may be larger than the file."""
    path.write_bytes(zipped(parts(pickled)))
    try:
        tensors = torch_file.read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for found in tensors.values():
        assert found.nbytes <= path.stat().st_size
        assert found.read().shape == found.shape


@given(edits=edits)
@settings(max_examples=60, deadline=None)
def test_an_edited_pickle_is_refused_or_harmless(tmp_path_factory, edits):
    good = a_dict(a=tensor(), b=tensor((3, 2), (1, 7), 2, hooks=b"ccollections\nOrderedDict\n)R"))
    load_or_refuse(tmp_path_factory.getbasetemp() / "pickle.pth", edited(good, edits))


PIECES = [b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", text("storage"), text("0")]
PIECES += [b"ctorch._utils\n_rebuild_tensor_v2\n", number(24), number(0), numbers(4, 6), tensor()]
PIECES += [b"\x89", b"q\0", b"h\0", b"r\0\0\0\0", b"j\0\0\0\0", b"G" + b"@" * 8]
PIECES += [bytes([code]) for code in b"RbQ(}])t\x85\x86\x87suaeN\x88."]


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_pickle_is_refused_or_harmless(tmp_path_factory, pieces):
    pickled = b"\x80\x02" + b"".join(pieces) + b"."
    load_or_refuse(tmp_path_factory.getbasetemp() / "pieces.pth", pickled)
