"""The chat command: its own commands, history, interruptions, and output streams."""

import io
import signal
import sys

import pytest

from llama_jax.cli.chat import Conversation, run_chat
from llama_jax.errors import UserError
from llama_jax.inference.request import Delta


class Echo:
    """A model that answers with the last message, and keeps every dialogue."""

    def __init__(self):
        self.dialogues = []
        self.interrupt_after = None
        self.signal = signal.SIGINT

    def chat(self, messages, *, stream, **options):
        assert stream
        self.dialogues.append([(message.role, message.content) for message in messages])
        if messages[-1].content == "too long":
            raise UserError("the dialogue has 99 tokens, which is too many")
        return self.words(messages[-1].content.split())

    def words(self, words):
        for number, word in enumerate(words):
            if number == self.interrupt_after:
                signal.raise_signal(self.signal)
            yield Delta(0, text=f" {word}!" if number else f"{word}!")


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(*lines, llm=None, **options):
        llm = llm or Echo()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        run_chat(Conversation(llm, **options))
        printed = capsys.readouterr()
        return llm.dialogues, printed.out, printed.err

    return run


def test_each_turn_includes_the_history(talk):
    heard, out, _ = talk("hello", "how are you", system="Be kind.")
    assert out == "hello!\nhow! are! you!\n"
    system, first = ("system", "Be kind."), ("user", "hello")
    assert heard == [
        [system, first],
        [system, first, ("assistant", "hello!"), ("user", "how are you")],
    ]


def test_only_answers_go_to_stdout(talk):
    _, out, err = talk("hello")
    assert out == "hello!\n"
    assert err.startswith("[/reset") and err.count("> ") == 2


def test_reset_clears_the_history_and_keeps_the_system_prompt(talk):
    heard, *_ = talk("hello", "/reset", "again", system="S")
    assert heard[1] == [("system", "S"), ("user", "again")]


def test_a_new_system_prompt_starts_over(talk):
    heard, _, err = talk("hello", "/system Be short.", "again", "/system", "once more")
    assert heard[1:] == [
        [("system", "Be short."), ("user", "again")],
        [("user", "once more")],
    ]
    assert "[a new dialogue]" in err


def test_exit_ends_and_blank_lines_are_ignored(talk):
    heard, out, _ = talk("", "   ", "/exit", "never")
    assert (heard, out) == ([], "")


def test_an_unknown_command_is_reported(talk):
    heard, _, err = talk("/stop")
    assert not heard and "[/stop is not a command; /reset" in err


def test_a_refused_message_is_one_line_and_not_in_the_history(talk):
    heard, out, err = talk("hello", "too long", "again")
    assert out == "hello!\nagain!\n"
    assert "[the dialogue has 99 tokens" in err
    assert heard[2] == [("user", "hello"), ("assistant", "hello!"), ("user", "again")]


def test_an_interrupt_stops_only_the_answer(talk):
    llm = Echo()
    llm.interrupt_after = 1
    heard, out, err = talk("one two three", "four", llm=llm)
    assert out == "one! two!\nfour!\n"  # the delta being made is the last
    assert "[stopped]" in err
    assert heard[1] == [("user", "one two three"), ("assistant", "one! two!"), ("user", "four")]


def test_sigterm_ends_the_program_after_the_delta(talk, capsys):
    llm = Echo()
    llm.interrupt_after, llm.signal = 1, signal.SIGTERM
    with pytest.raises(SystemExit) as end:
        talk("one two three", "four", llm=llm)
    assert end.value.code == 143
    assert capsys.readouterr().out == "one! two!\n"


def test_input_in_another_encoding_is_one_line(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(UserError, match="the input is not UTF-8 at byte 3; convert it"):
        run_chat(Conversation(Echo()))


def test_a_closed_standard_input_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="--chat reads standard input, which is closed"):
        run_chat(Conversation(Echo()))


def test_an_interrupt_at_the_prompt_shows_how_to_end(monkeypatch, capsys):
    keys = iter([KeyboardInterrupt(), "/exit\n"])

    def readline():
        key = next(keys)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr(sys.stdin, "readline", readline, raising=False)
    run_chat(Conversation(Echo()))
    assert "[/exit ends the chat]" in capsys.readouterr().err


def test_help_lists_the_commands_and_quit_ends(talk):
    heard, out, err = talk("/help", "/quit", "hello")
    assert (heard, out) == ([], "") and err.count("/system TEXT") == 2
