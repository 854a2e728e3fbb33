"""Stop signals, in one process and with a fake agreement of two; test_distributed has real ones."""

import os
import signal
import subprocess
import sys
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from llama_jax.distributed.preemption import SharedStop, StopSignal, stop_of_all, stop_signal

TWICE = """
import os, signal, time
from llama_jax.distributed.preemption import stop_signal
with stop_signal({farewell}) as stop:
    os.kill(os.getpid(), {first})
    while not stop.requested(): time.sleep(0.01)
    print(stop.exit_code, flush=True)
    os.kill(os.getpid(), {second})
    time.sleep(20)
    print("still here", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_first_signal_is_recorded(number, code):
    before = signal.getsignal(number)
    with stop_signal() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
    assert stop.exit_code == code
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("farewell", "line"),
    [
        pytest.param("None", "", marks=pytest.mark.slow),
        ("lambda: 'step 5 is kept'", "step 5 is kept\n"),
    ],
)
def test_second_signal_ends_the_process_with_the_farewell(farewell, line):
    script = TWICE.format(first=int(signal.SIGTERM), second=int(signal.SIGINT), farewell=farewell)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=15
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "143\n", line)


def test_sighup_after_another_signal_does_not_end_the_process():
    with stop_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)  # a process that ended here would fail the test
        signal.raise_signal(signal.SIGHUP)
    assert stop.exit_code == 143


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_do_not_catch_signals():
    found = []

    def work():
        with stop_signal() as stop:
            found.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_one_process_has_a_plain_stop_signal():
    with stop_of_all() as stop:
        assert type(stop) is StopSignal


@pytest.fixture
def two_processes(monkeypatch):
    """Make this process one of two, which agree to stop at the third call; return the calls."""
    calls = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    point = "reached_preemption_sync_point"
    monkeypatch.setattr(multihost_utils, point, lambda n: calls.append(n) or n == 3)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_processes_stop_once_they_have_agreed(two_processes):
    with stop_of_all() as stop:
        assert [stop.requested() for _ in range(5)] == [False, False, True, True, True]
    assert two_processes == [1, 2, 3]  # numbered, and none after the agreement
    assert stop.exit_code == 143


def test_ctrl_c_is_passed_on_as_sigterm_and_the_second_ends_the_process(two_processes, monkeypatch):
    sent, ended = [], []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    with stop_of_all() as stop:
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert two_processes == []  # a call by this process only would separate the two
        assert ended == [] and not stop.requested() and stop.exit_code == 130
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_after_the_agreement_ends_the_process(two_processes, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "kill", lambda *_: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = SharedStop()
    while not stop.requested():
        pass
    signal.raise_signal(signal.SIGTERM)
    stop.handle(signal.SIGINT, None)
    assert ended[:2] == [143, 130]
