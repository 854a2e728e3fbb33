"""A chat on a terminal: commands, history, interruptions, and what goes to which stream."""

import io
import signal

import pytest

from llama_jax.cli import chat as conversation
from llama_jax.cli.chat import Conversation, converse
from llama_jax.errors import UserError
from llama_jax.inference.completions import CompletionPiece


class Parrot:
    """Answers with what it was told, and keeps every dialogue."""

    def __init__(self):
        self.heard = []
        self.interrupt_after = None
        self.signal = signal.SIGINT

    def chat(self, messages, *, stream, **options):
        assert stream
        self.heard.append([(message.role, message.content) for message in messages])
        if messages[-1].content == "too long":
            raise UserError("the dialogue has 99 tokens, which is too many")
        return self.words(messages[-1].content.split())

    def words(self, words):
        for number, word in enumerate(words):
            if number == self.interrupt_after:
                signal.raise_signal(self.signal)
            yield CompletionPiece(0, f" {word}!" if number else f"{word}!", "")


@pytest.fixture
def talk(monkeypatch, capsys):
    def run(*lines, llm=None, **options):
        llm = llm or Parrot()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        converse(Conversation(llm, **options))
        said = capsys.readouterr()
        return llm.heard, said.out, said.err

    return run


def test_every_turn_is_told_what_came_before(talk):
    heard, out, _ = talk("hello", "how are you", system="Be kind.")
    assert out == "hello!\nhow! are! you!\n"
    system, first = ("system", "Be kind."), ("user", "hello")
    assert heard == [
        [system, first],
        [system, first, ("assistant", "hello!"), ("user", "how are you")],
    ]


def test_answers_alone_go_to_stdout(talk):
    _, out, err = talk("hello")
    assert out == "hello!\n"
    assert err.startswith("[/reset") and err.count("> ") == 2


def test_reset_forgets_and_keeps_the_system_message(talk):
    heard, *_ = talk("hello", "/reset", "again", system="S")
    assert heard[1] == [("system", "S"), ("user", "again")]


def test_a_new_system_message_begins_anew(talk):
    heard, _, err = talk("hello", "/system Be short.", "again", "/system", "once more")
    assert heard[1:] == [
        [("system", "Be short."), ("user", "again")],
        [("user", "once more")],
    ]
    assert "[a new dialogue]" in err


def test_exit_leaves_and_blank_lines_say_nothing(talk):
    heard, out, _ = talk("", "   ", "/exit", "never")
    assert (heard, out) == ([], "")


def test_an_unknown_command_is_said(talk):
    heard, _, err = talk("/quit")
    assert not heard and "[/quit is not understood; /reset" in err


def test_what_cannot_be_asked_is_a_line_and_was_not_said(talk):
    heard, out, err = talk("hello", "too long", "again")
    assert out == "hello!\nagain!\n"
    assert "[the dialogue has 99 tokens" in err
    assert heard[2] == [("user", "hello"), ("assistant", "hello!"), ("user", "again")]


def test_an_interrupt_stops_the_answer_only(talk):
    llm = Parrot()
    llm.interrupt_after = 1
    heard, out, err = talk("one two three", "four", llm=llm)
    assert out == "one! two!\nfour!\n"  # the piece that was being made is the last
    assert "[stopped]" in err
    assert heard[1] == [("user", "one two three"), ("assistant", "one! two!"), ("user", "four")]


def test_a_signal_to_end_ends_the_program_after_the_piece(talk, capsys):
    llm = Parrot()
    llm.interrupt_after, llm.signal = 1, signal.SIGTERM
    with pytest.raises(SystemExit) as end:
        talk("one two three", "four", llm=llm)
    assert end.value.code == 143
    assert capsys.readouterr().out == "one! two!\n"


def test_what_is_typed_in_another_encoding_is_a_line(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(UserError, match="what was typed is not UTF-8 at byte 3; convert it"):
        converse(Conversation(Parrot()))


def test_a_closed_standard_input_is_a_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="--chat reads standard input, which is closed"):
        converse(Conversation(Parrot()))


def test_an_interrupt_at_the_prompt_says_how_to_leave(monkeypatch, capsys):
    keys = iter([KeyboardInterrupt(), "/exit\n"])

    def readline():
        key = next(keys)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr(conversation.sys.stdin, "readline", readline, raising=False)
    converse(Conversation(Parrot()))
    assert "[/exit leaves]" in capsys.readouterr().err
