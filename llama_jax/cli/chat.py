"""A chat on a terminal: answers go to stdout as they are made, everything else to stderr."""

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.cli.model_flags import READING
from llama_jax.distributed.preemption import stop_signal
from llama_jax.errors import UserError, require
from llama_jax.files import first_with_progress
from llama_jax.llm import LLM
from llama_jax.text.chat import Message

HELP = (
    "/reset starts over, /system TEXT sets the system prompt, /help is this, /exit or /quit ends;"
    " Ctrl-C stops an answer"
)


def print_format(llm: LLM) -> None:
    """Say in which format the dialogue is written; warn if the checkpoint does not know it."""
    used = {
        "": "llama2, since the checkpoint records none; a model that was not trained on it"
        " answers badly: choose another with --template, or complete texts with --prompt",
        "jinja": "a Jinja template",
    }
    kind = "warning: " if llm.chat_format == "" else ""
    print(f"[{kind}chat format: {used.get(llm.chat_format, llm.chat_format)}]", file=sys.stderr)


class Conversation:
    """A dialogue with a model, with its history."""

    def __init__(self, llm: LLM, system: str = "", **options: Any):
        """Start a dialogue; `options` are those of `LLM.chat`."""
        self._llm, self._options = llm, options
        self._system, self._history = system, list[Message]()

    def reset(self, system: str | None = None) -> None:
        """Clear the history; a `system` that is not None becomes the system prompt."""
        self._history.clear()
        self._system = self._system if system is None else system

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer as it grows, and add question and answer to the history.

        An answer that is interrupted is kept as far as it went; one of whitespace alone is not.

        Raises:
          UserError: as `LLM.chat`; the history stays as it was.
        """
        system = [Message("system", self._system)] if self._system else []
        dialogue = [*self._history, Message("user", text)]
        deltas = self._llm.chat([*system, *dialogue], stream=True, **self._options)
        answer = ""
        try:
            for delta in deltas:
                answer += delta.text
                yield delta.text
        finally:
            deltas.close()
            if answer.strip():
                self._history = [*dialogue, Message("assistant", answer)]


def run_chat(conversation: Conversation) -> None:
    """Answer line after line of stdin until it ends or says /exit.

    Raises:
      UserError: when stdin is closed, or not UTF-8.
    """
    require(sys.stdin is not None, "--chat reads standard input, which is closed; open it")
    print(f"[{HELP}]", file=sys.stderr)
    while True:
        try:
            line = _read_line()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n[/exit ends the chat]", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not UTF-8 at byte {error.start}; convert it") from error
        command, _, rest = line.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command in ("/reset", "/system"):
            conversation.reset(rest.strip() if command == "/system" else None)
            print("[a new dialogue]", file=sys.stderr)
        elif command == "/help":
            print(f"[{HELP}]", file=sys.stderr)
        elif command.startswith("/"):
            print(f"[{command} is not a command; {HELP}]", file=sys.stderr)
        elif command:
            _print_answer(conversation, line.strip())


def _read_line() -> str:
    """Return the next line of input.

    On a terminal it is read with readline: it can be edited, and be longer than the 4,095 bytes at
    which the system itself cuts lines. Otherwise the prompt goes to stderr, so that stdout holds
    answers only.
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


def _print_answer(conversation: Conversation, text: str) -> None:
    """Print an answer as it grows; Ctrl-C stops the answer only.

    The signal is remembered, not raised: Python drops what is raised inside some callbacks.
    """
    with print_warnings(), stop_signal() as stop:
        try:
            for part in first_with_progress(READING, conversation.ask(text)):
                print(part, end="", flush=True)
                if stop.requested():
                    break
            print(flush=True)
        except UserError as error:
            print(f"[{error}]", file=sys.stderr)
    if stop.requested():
        print("[stopped]", file=sys.stderr)
    if stop.number not in (0, signal.SIGINT):  # SIGTERM, or the terminal was closed
        raise SystemExit(stop.exit_code)


def print_answer(llm: LLM, messages: Sequence[Message], **options: Any) -> None:
    """Print the answer to a dialogue as it grows; `options` are those of `LLM.chat`."""
    with print_warnings():
        deltas = llm.chat(messages, stream=True, **options)
    reason = ""
    for delta in first_with_progress(READING, deltas):
        print(delta.text, end="", flush=True)
        reason = delta.finish_reason
    print(flush=True)
    if reason == "length":
        print("[stopped after --max_tokens]", file=sys.stderr)


@contextlib.contextmanager
def print_warnings() -> Iterator[None]:
    """At the end of the block, print a line on stderr for each warning of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"[{warning.message}]", file=sys.stderr)
