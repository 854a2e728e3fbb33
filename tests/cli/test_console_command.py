"""The console command `llama-jax`, in a new process, as pip's script starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.cli.main import COMMANDS, main
from llama_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "from llama_jax.cli.main import main; main()"


def llama_jax(*words):
    """Run `llama-jax WORDS`; returns exit code, stdout and stderr."""
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    code, out, err = llama_jax(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: llama-jax {command} ")


def test_help_lists_every_command():
    code, out, err = llama_jax("--help")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [*COMMANDS]
    assert llama_jax()[0] == 2


def test_debug_may_precede_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llama-jax", "--debug", "plot", str(tmp_path)])
    with pytest.raises(UserError, match="has no metrics"):
        main()


def test_a_misspelt_command_is_a_one_line_error():
    assert llama_jax("sampel") == (
        2,
        "",
        "error: unknown command 'sampel'; did you mean 'sample'?\n",
    )


def test_chat_is_sample_with_the_chat_flag():
    code, _, err = llama_jax("chat", "--prompt", "Hello")
    assert (code, err) == (2, "error: --chat does not use --prompt; leave it out\n")
    assert llama_jax("sample", "--chat", "--prompt", "Hello")[1:] == ("", err)


def test_arguments_and_exit_code_are_those_of_the_command(tmp_path):
    code, out, err = llama_jax("plot", str(tmp_path))
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path} has no metrics.jsonl; expected the folder of a run\n"
