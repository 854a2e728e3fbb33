"""A polite stop, in this process and, for the impolite second signal, in another."""

import signal
import subprocess
import sys
import threading

import pytest

from llama_jax.distributed.preemption import stop_signal

TWICE = """
import os, signal, time
from llama_jax.distributed.preemption import stop_signal
with stop_signal() as stop:
    os.kill(os.getpid(), {first})
    while not stop.ask(): time.sleep(0.01)
    print(stop.exit_code, flush=True)
    os.kill(os.getpid(), {second})
    time.sleep(20)
    print("still here", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_remembered(number, code):
    before = signal.getsignal(number)
    with stop_signal() as stop:
        assert not stop.ask()
        signal.raise_signal(number)
        assert stop.ask()
    assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_the_process_at_once():
    script = TWICE.format(first=int(signal.SIGTERM), second=int(signal.SIGINT))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=15
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "143\n", "")


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails():
    found = []

    def work():
        with stop_signal() as stop:
            found.append(stop.ask())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
