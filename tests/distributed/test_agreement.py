"""What one process fails at, all fail at, with one line. Real processes: test_distributed."""

import json

import numpy as np
import pytest
from jax.experimental import multihost_utils

from llama_jax.distributed import consistency as agreement
from llama_jax.distributed.consistency import gathered, require_same, together
from llama_jax.errors import UsageError, UserError


@pytest.fixture
def peers(monkeypatch):
    """Makes this process one of several, of which the others tell this, each in turn."""
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)

    def tell(*texts, me=0):
        texts = iter(texts)

        def with_theirs(ours):
            told = [next(texts)]
            told.insert(me, ours)
            return told

        monkeypatch.setattr(agreement, "gathered", with_theirs)

    return tell


def test_alone_there_is_nobody_to_ask():
    assert gathered("é") == ["é"]
    require_same({"a": 1})
    with together():
        pass
    with pytest.raises(ZeroDivisionError), together():
        raise ZeroDivisionError


@pytest.mark.parametrize("theirs", ["", "a longer text ☂", "é"])
def test_texts_of_any_length_are_exchanged(monkeypatch, theirs):
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)

    def allgather(ours):
        content = np.frombuffer(theirs.encode(), np.uint8)
        if np.ndim(ours) == 0:
            return np.stack([ours, np.int32(len(content))])
        return np.stack([ours, np.pad(content, (0, len(ours) - len(content)))])

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    assert gathered("äö") == ["äö", theirs]


def test_a_failure_elsewhere_is_told_here_with_its_exit_code(peers):
    for told, kind in (("2 batch is wrong", UsageError), ("1 disk is full", UserError)):
        peers(told)
        with pytest.raises(UserError, match=f"^process 1: {told[2:]}$") as error, together():
            pass
        assert type(error.value) is kind


def test_who_fails_itself_tells_its_own(peers):
    told = []
    peers("1 theirs")
    gather = agreement.gathered
    agreement.gathered = lambda text: gather(told.append(text) or text)
    with pytest.raises(UsageError, match=r"^ours$"), together():
        raise UsageError("ours")
    assert told == ["2 ours"]


def test_a_fault_without_a_line_stops_the_others_too(peers):
    peers("1 KeyError('x')")
    with pytest.raises(UserError, match=r"process 1: KeyError\('x'\)"), together():
        pass
    assert agreement._told(KeyError("x")) == "1 KeyError('x')"


def test_all_well(peers):
    peers("", json.dumps({"a": [1, 2], "b": 0.1}))
    with together():
        pass
    require_same({"b": 0.1, "a": (1, 2)})


@pytest.mark.parametrize("me", [0, 1])
def test_the_one_that_differs_is_named_everywhere(peers, me):
    facts = [{"a": 1, "b": 0.1}, {"a": 1, "b": 0.2}]
    peers(json.dumps(facts[1 - me]), me=me)
    with pytest.raises(UserError, match=r"^process 1 has b=0.2 and process 0 has b=0.1; start"):
        require_same(facts[me])
