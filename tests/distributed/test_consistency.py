"""Exchanges between processes, with a fake all-gather; test_distributed has real processes."""

import json

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from llama_jax.distributed.consistency import gathered, require_same, together
from llama_jax.errors import UsageError, UserError


@pytest.fixture
def exchange(monkeypatch):
    """Return a function that makes this process one of two, and a list of what it sends."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sent = []

    def start(theirs, number=0):
        other = np.frombuffer(theirs.encode(), np.uint8)

        def allgather(ours):
            if np.ndim(ours) == 0:
                pair = [ours, np.int32(len(other))]
            else:
                sent.append(bytes(ours).rstrip(b"\0").decode())
                pair = [ours, np.pad(other, (0, len(ours) - len(other)))]
            return np.stack(pair if number == 0 else pair[::-1])

        monkeypatch.setattr(multihost_utils, "process_allgather", allgather)

    return start, sent


def test_one_process_exchanges_nothing():
    assert gathered("é") == ["é"]
    require_same({"a": 1})
    with together():
        pass
    with pytest.raises(ZeroDivisionError), together():
        raise ZeroDivisionError


@pytest.mark.parametrize("theirs", ["", "a longer text ☂", "é"])
def test_texts_of_any_length_are_gathered(exchange, theirs):
    exchange[0](theirs)
    assert gathered("äö") == ["äö", theirs]


@pytest.mark.parametrize(
    ("report", "kind"),
    [
        ("2 batch is wrong", UsageError),
        ("1 disk is full", UserError),
        ("1 KeyError('x')", UserError),
    ],
)
def test_failure_of_another_process_is_raised_with_its_exit_code(exchange, report, kind):
    exchange[0](report)
    with pytest.raises(UserError) as error, together():
        pass
    assert str(error.value) == f"process 1: {report[2:]}"
    assert type(error.value) is kind


@pytest.mark.parametrize(
    ("error", "report"), [(UsageError("ours"), "2 ours"), (KeyError("x"), "1 KeyError('x')")]
)
def test_failure_of_this_process_is_sent_and_raised(exchange, error, report):
    start, sent = exchange
    start("1 theirs")
    with pytest.raises(type(error)) as raised, together():
        raise error
    assert raised.value is error
    assert sent == [report]


def test_success_of_all_processes(exchange):
    exchange[0]("")
    with together():
        pass
    exchange[0](json.dumps({"a": [1, 2], "b": 0.1}))
    require_same({"b": 0.1, "a": (1, 2)})


@pytest.mark.parametrize("number", [0, 1])
def test_error_of_different_values_names_the_process_on_all(exchange, number):
    values = [{"a": 1, "b": 0.1}, {"a": 1, "b": 0.2}]
    exchange[0](json.dumps(values[1 - number]), number)
    with pytest.raises(UserError, match=r"^process 1 has b=0.2 and process 0 has b=0.1; start"):
        require_same(values[number])
