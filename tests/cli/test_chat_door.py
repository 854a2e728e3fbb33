"""The chat command on a pseudo-terminal, where Ctrl-C is a key."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compilation import xla_flags
from tiny_weights import tiny_weights

from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.text.chat import Message
from llama_jax.text.chat_formats import resolve_template
from llama_jax.text.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 240  # seconds; for a slow machine
# What a shell does for a program in the foreground: keys such as Ctrl-C reach it as signals, which
# it does not ignore, as the process of the tests may.
IN_FOREGROUND = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A program on its own terminal; its output is kept in `shown`."""

    def __init__(self, *words, **options):
        self._keys, theirs = pty.openpty()
        command = [sys.executable, "-c", IN_FOREGROUND, *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, **options
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text):
        os.write(self._keys, text.encode())

    def wait_for(self, text, after=0):
        """Return where a text ends in the output after a position."""
        self._wait(lambda: text in self.shown[after:], text)
        return self.shown.index(text, after) + len(text)

    def wait_for_more(self, length):
        self._wait(lambda: len(self.shown) > length, "more")

    def _wait(self, is_enough, what):
        end = time.monotonic() + TIMEOUT
        while not is_enough():
            assert time.monotonic() < end, f"{what!r} was not shown: {self.shown[-2000:]!r}"
            if select.select([self._keys], [], [], 1)[0]:
                self.shown += os.read(self._keys, 65536).decode(errors="replace")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._keys)


@pytest.fixture
def terminal(tmp_path, request):
    """A chat with a model whose answers are very long."""
    context = getattr(request, "param", 30_000)
    checkpoint_folder.write(tiny_weights(num_layers=1, context_length=context), tmp_path / "ckpt")
    endless = ("--max_tokens=25000", "--logit_bias=1=-inf", "--logit_bias=2=-inf")
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(),
        "LLAMA_JAX_CACHE": str(tmp_path / "cache"),
    }
    words = (str(REPOSITORY / "sample.py"), "--ckpt=ckpt", "--chat", *endless)
    terminal = Terminal(*words, cwd=tmp_path, env=environment)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_only_the_answer(terminal):
    shown = terminal.wait_for("> ")
    for question in ("abc", "cab"):
        terminal.type(f"{question}\n")
        shown = terminal.wait_for(question, shown)
        terminal.wait_for_more(shown + 40)  # the answer has begun
        terminal.type("\x03")
        shown = terminal.wait_for("> ", terminal.wait_for("[stopped]", shown))
    terminal.type("/exit\n")
    assert terminal.process.wait(TIMEOUT) == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [1000], indirect=True)
def test_a_line_may_be_longer_than_4095_bytes(terminal, tmp_path):
    question = "abc " * 1250 + "."  # 5,001 bytes; a terminal's line ends after 4,095
    tokenizer = load_tokenizer(tmp_path / "ckpt" / "tokenizer.model")
    size = len(resolve_template("").encode([Message("user", question)], tokenizer))
    terminal.wait_for("> ")
    terminal.type(f"{question}\n")
    terminal.wait_for(f"[the dialogue has {size} tokens, but the context has room for 750;")
    terminal.type("/exit\n")
    assert terminal.process.wait(TIMEOUT) == 0
