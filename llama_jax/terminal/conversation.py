"""A chat on a terminal: what the user types in, the assistant's answer as it grows out.

Answers go to stdout, all that is said about them to stderr. It knows no chat format.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import UserError
from llama_jax.llm import LLM
from llama_jax.processes.stop_signal import stop_signal
from llama_jax.terminal.printing import warnings_told
from llama_jax.terminal.standard_input import not_utf8, require_stdin
from llama_jax.text.messages import Message

HELP = (
    "/reset begins anew, /system TEXT sets the system message, /exit leaves; Ctrl-C stops an answer"
)


class Conversation:
    """A dialogue with a model, which remembers what was said."""

    def __init__(self, llm: LLM, system: str = "", **options: Any):
        """Begin; `options` are those of `LLM.chat`."""
        self._llm, self._options = llm, options
        self._system, self._said = system, list[Message]()

    def reset(self, system: str | None = None) -> None:
        """Forget what was said, and take a new system message if one is given."""
        self._said.clear()
        self._system = self._system if system is None else system

    def ask(self, text: str) -> Iterator[str]:
        """The answer as it grows. If it is left early, what there is of it was the answer.

        An answer of blanks alone was none, and its question was not asked.

        Raises:
          UserError: as `LLM.chat`; then nothing was said.
        """
        system = [Message("system", self._system)] if self._system else []
        asked = [*self._said, Message("user", text)]
        pieces = self._llm.chat([*system, *asked], stream=True, **self._options)
        answer = ""
        try:
            for piece in pieces:
                answer += piece.text
                yield piece.text
        finally:
            pieces.close()
            if answer.strip():
                self._said = [*asked, Message("assistant", answer)]


def converse(conversation: Conversation) -> None:
    """Answer line after line of stdin until it ends or says /exit.

    Raises:
      UserError: when stdin is closed, or not UTF-8.
    """
    require_stdin("--chat")
    print(f"[{HELP}]", file=sys.stderr)
    while True:
        try:
            line = _read()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n[/exit leaves]", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise not_utf8("what was typed", error) from error
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            conversation.reset(rest.strip() if command == "/system" else None)
            print("[a new dialogue]", file=sys.stderr)
        elif command.startswith("/"):
            print(f"[{command} is not understood; {HELP}]", file=sys.stderr)
        elif command:
            _answer(conversation, line.strip())


def _read() -> str:
    """What is typed next.

    On a terminal with readline: lines may be edited, and be longer than the 4,095 bytes at which
    the system itself cuts them. Else asked for on stderr, so that stdout holds answers alone.
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  from now on `input` uses it
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _answer(conversation: Conversation, text: str) -> None:
    """Print an answer as it grows; Ctrl-C stops it alone.

    The signal is remembered, not raised: Python drops what is raised inside some callbacks.
    """
    with warnings_told(), stop_signal() as stop:
        try:
            for piece in conversation.ask(text):
                print(piece, end="", flush=True)
                if stop.ask():
                    break
            print(flush=True)
        except UserError as error:
            print(f"[{error}]", file=sys.stderr)
    if stop.ask():
        print("[stopped]", file=sys.stderr)
    if stop.number == signal.SIGTERM:
        raise SystemExit(stop.exit_code)
