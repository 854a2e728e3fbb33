"""A stop that several processes agree on. Real processes: test_distributed."""

import os
import signal

import pytest
from jax.experimental import multihost_utils

from llama_jax.distributed import preemption as shared_stop
from llama_jax.distributed.preemption import SharedStop, StopSignal, stop_of_all


@pytest.fixture
def two_processes(monkeypatch):
    """Pretends to be one of two; all agree on stopping at the third question."""
    asked = []
    monkeypatch.setattr(shared_stop.jax, "process_count", lambda: 2)
    point = "reached_preemption_sync_point"
    monkeypatch.setattr(multihost_utils, point, lambda n: asked.append(n) or n == 3)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield asked
    for number, handler in before.items():
        signal.signal(number, handler)


def test_alone_it_is_the_plain_stop():
    with stop_of_all() as stop:
        assert type(stop) is StopSignal


def test_all_stop_when_all_have_agreed_and_not_before(two_processes):
    with stop_of_all() as stop:
        assert [stop.ask() for _ in range(5)] == [False, False, True, True, True]
    assert two_processes == [1, 2, 3]  # each question has its number, and after a yes none is put
    assert stop.exit_code == 143


def test_ctrl_c_goes_the_way_of_sigterm_and_a_second_ends_at_once(two_processes, monkeypatch):
    sent, ended = [], []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    with stop_of_all() as stop:
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert two_processes == []  # a question that only this process puts would part the two
        assert ended == [] and not stop.ask() and stop.exit_code == 130
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_after_the_agreement_ends_at_once(two_processes, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "kill", lambda *_: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = SharedStop()
    while not stop.ask():
        pass
    signal.raise_signal(signal.SIGTERM)
    stop.remember(signal.SIGINT, None)
    assert ended[:2] == [143, 130]
