"""The command serve.py: what is wrong is found before anything is loaded, in one line."""

import socket
import sys

import jax
import pytest
from tiny_weights import tiny_weights

from llama_jax.cli import main as cli
from llama_jax.cli import serve as serve_command
from llama_jax.cli.serve import KEY_VARIABLE, read_key
from llama_jax.errors import UserError
from llama_jax.formats import checkpoint

pytestmark = pytest.mark.serve  # the flags are checked where the server is installed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("serve")
    checkpoint.write(tiny_weights(num_layers=1), place / "ckpt")
    (place / "empty").mkdir()
    return place


@pytest.fixture
def serve(folder, monkeypatch, capsys):
    """Run the command in this process up to its error; returns exit code and stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(folder / "cache"))
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)  # no cache for other tests

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["serve.py", *words])
        with pytest.raises(SystemExit) as end:
            cli.run(serve_command.main)
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return end.value.code, err

    return run


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "no model is named; add --model ckpt/ or --model smollm2"),
        (("ckpt",), 2, "'ckpt' is not understood; did you mean --model ckpt?"),
        (("--model=nowhere",), 1, "nowhere does not exist"),
        (("--model=empty",), 1, "empty holds no run"),
        (("--model=ckpt", "--model=ckpt"), 2, "is the second of the name ckpt"),
        (("--model=ckpt", "--port=70000"), 2, "port=70000 is out of range"),
        (("--model=ckpt", "--host=256.1.1.1"), 1, "cannot listen on 256.1.1.1"),
        (("--model=ckpt", "--slots=-1"), 2, "slots=-1 is out of range"),
        (("--model=ckpt", "--memory=nan"), 2, "memory=nan is out of range"),
        (("--model=ckpt", "--memory=1e-9"), 2, "--memory=1e-09 is less than"),
        (("--model=ckpt", "--request_timeout=0"), 2, "request_timeout=0.0 is out of range"),
        (("--model=ckpt", "--allow_origin=chat.example"), 2, "--allow_origin=chat.example"),
        (("--model=ckpt", "--api_key_file=nowhere"), 1, "--api_key_file=nowhere cannot be read"),
        (("--model=ckpt", "--template=chatmk"), 2, "did you mean 'chatml'?"),
        (("--model=ckpt", "--base=ckpt"), 2, "--base=ckpt is for adapters; leave it out"),
        (("--model=ckpt", "--quantize=int5"), 1, "quantize='int5' is unknown"),
        (("--model=ckpt", "--max_contxt=3"), 2, "did you mean '--max_context'?"),
    ],
)
def test_errors_are_one_line_at_start(serve, words, code, message):
    found, line = serve("--port=0", *words)
    assert message in line and found == code


def test_a_taken_port_is_an_error_before_loading(serve):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, line = serve("--model=ckpt", f"--port={port}")
    assert code == 1 and f"port {port}: Address already in use; choose another" in line


def test_a_missing_package_is_named(serve, monkeypatch):
    monkeypatch.delitem(sys.modules, "llama_jax.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, line = serve("--model=ckpt")
    assert code == 1
    assert "uvicorn is not installed; install it with: pip install 'llama_jax[serve]'" in line


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o600)
    assert read_key(None) == "" and read_key(str(file)) == "secret"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(KEY_VARIABLE, "other")
    assert read_key(None) == "other"
    with pytest.raises(UserError, match="exclude each other"):
        read_key(str(file))


def test_a_key_file_that_others_can_read_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    file.write_text("secret")
    file.chmod(0o644)
    assert read_key(str(file)) == "secret"
    assert f"warning: --api_key_file={file} can be read by others" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", " \n", "two words", "schlüssel", "a\x00b"])
def test_keys_that_no_header_can_have_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(UserError, match=r"is empty|no header can have"):
        read_key(str(file))
