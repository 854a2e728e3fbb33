"""Files and standard input as sample.py reads them: text in UTF-8, or an error of one line."""

import contextlib
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import require
from llama_jax.distributed.preemption import stop_signal
from llama_jax.errors import UserError
from llama_jax.inference.completions import Piece
from llama_jax.inference.request import Wishes
from llama_jax.llm import LLM
from llama_jax.text.chat import Message


def read_text(flag: str, path: str) -> str:
    """The text of the file that a flag names; of stdin for "-".

    Raises:
      UserError: naming the flag, when there is no such file or it is not UTF-8.
    """
    given = f"{flag}={path}"
    try:
        if path == "-":
            require_stdin(given)
            return sys.stdin.read()
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{given}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(given, error) from error


def require_stdin(who: str) -> None:
    """Raise `UsageError` if this program was started without standard input."""
    require(sys.stdin is not None, f"{who} reads standard input, which is closed; open it")


def not_utf8(what: str, error: UnicodeDecodeError) -> UserError:
    """The complaint about bytes that are no text."""
    return UserError(f"{what} is not UTF-8 at byte {error.start}; convert it")


# Samples on a terminal: text to stdout as it grows, all that is said about it to stderr.

WHY = {
    "length": "stopped after --max_tokens",
    "context": "stopped where the model's context is full",
}


def print_samples(
    llm: LLM,
    prompts: Sequence[str],
    wishes: Wishes,
    *,
    begun: float,
    echo: bool = True,
) -> None:
    """Print the texts that are wished for, each prompt's in turn.

    Text j of any prompt has a seed of its own, so a prompt gives alone what it gives among others.

    Args:
      begun: `time.perf_counter()` at the start of the program, for the time to the first token.

    Raises:
      UserError: when a prompt does not fit.
    """
    request = llm.request(list(prompts), wishes, echo)
    pieces = _print_in_order(request.echoes, _timed(llm.pieces(request), begun))
    told = sorted((piece for piece in pieces if piece.logprobs), key=lambda piece: piece.row)
    if wishes.logprobs is not None:
        _print_logprobs(llm, told)


def print_answer(llm: LLM, messages: Sequence[Message], **options: Any) -> None:
    """Print the answer to a dialogue as it grows; `options` are those of `LLM.chat`."""
    with warnings_told():
        pieces = llm.chat(messages, stream=True, **options)
    end = ""
    for piece in pieces:
        print(piece.text, end="", flush=True)
        end = piece.finish_reason
    print(flush=True)
    if end in WHY:
        print(f"[{WHY[end]}]", file=sys.stderr)


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """At the end of the block, a line on stderr for each warning that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"[{warning.message}]", file=sys.stderr)


def _print_logprobs(llm: LLM, pieces: Iterable[Piece]) -> None:
    """On stderr, a line a token: its log-probability, its text, and the likeliest in its place."""
    name = llm.tokenizer.piece_text
    for piece in pieces:
        for token, told in zip(piece.ids, piece.logprobs):
            top = "  ".join(f"{name(other)!r} {value:.3f}" for other, value in told.top)
            line = f"[{piece.row + 1}] {told.logprob:8.3f}  {name(token)!r}"
            print(f"{line:<32}{top}".rstrip(), file=sys.stderr)


def _print_in_order(prompts: Sequence[str], pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The first row as it grows; the others, which grow beside it, once those before are out.

    Each piece is passed on once it has been dealt with.
    """
    waiting: list[list[str]] = [[prompt] for prompt in prompts]
    ends = [""] * len(prompts)
    current = 0
    for piece in pieces:
        waiting[piece.row].append(piece.text)
        ends[piece.row] = piece.finished or ends[piece.row]
        while current < len(prompts):
            print("".join(waiting[current]), end="", flush=True)
            waiting[current].clear()
            if not ends[current]:
                break
            print(flush=True)
            current += 1
            if current < len(prompts):
                print(flush=True)
        yield piece
    for row, end in enumerate(ends):
        if end in WHY:
            which = f"sample {row + 1}: " if len(ends) > 1 else ""
            print(f"[{which}{WHY[end]}]", file=sys.stderr)


def _timed(pieces: Iterable[Piece], begun: float) -> Iterator[Piece]:
    """The pieces, then a line about speed: to the first token, and of those after it.

    The chunk after the first tokens has its program compiled or loaded; where there are more, the
    speed is theirs.
    """
    times: list[float] = []  # of the first token, and of the end of each chunk after it
    tokens: list[int] = []  # of all rows, that each brought
    row = -1
    for piece in pieces:
        now = time.perf_counter()
        if piece.row <= row or not times:  # a chunk begins
            times.append(now)
            tokens.append(0)
        row, times[-1] = piece.row, now
        tokens[-1] += piece.tokens
        yield piece
    skipped = 2 if len(times) > 2 else 1
    seconds = times[-1] - times[skipped - 1]
    rate = f"{sum(tokens[skipped:]) / seconds:,.0f} tokens/s" if len(times) > 1 else "one token"
    print(f"\n[first token after {times[0] - begun:.2f} s, then {rate}]", file=sys.stderr)


# A chat on a terminal: what the user types in, the assistant's answer as it grows out.
#
# Answers go to stdout, all that is said about them to stderr. It knows no chat format.

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
