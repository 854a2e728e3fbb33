"""Atomic creation of files and folders, and progress output."""

import errno
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from llama_jax import files
from llama_jax.errors import UserError
from llama_jax.files import cache_folder, new_folder, new_path

DIE = """
import os, sys
from llama_jax.files import new_path
with new_path(sys.argv[1]) as place:
    place.write_text("half")
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def make_file(place):
    place.write_text("whole")


def make_folder(place):
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "file").write_text("whole")


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_new_path_appears_when_complete_and_never_overwrites(tmp_path, make):
    with new_path(tmp_path / "new" / "out.bin") as place:
        assert place.name == "out.bin" and not place.exists()
        make(place)
        assert not (tmp_path / "new" / "out.bin").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.bin"]
    made = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert [path.read_text() for path in made] == ["whole"]
    with pytest.raises(UserError, match="exists already"), new_path(tmp_path / "new" / "out.bin"):
        raise AssertionError("the block ran")


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), OSError("disk full")])
def test_failed_block_leaves_nothing(tmp_path, make, error):
    with pytest.raises(type(error)), new_path(tmp_path / "new" / "out") as place:
        make(place)
        raise error
    assert not list(tmp_path.iterdir())


def test_path_created_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="exists already"), new_path(tmp_path / "out") as place:
        make_file(place)
        (tmp_path / "out").write_text("another's")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "another's"


@pytest.mark.parametrize("call", ["link", "rename"])  # that publish a file and a folder
def test_what_another_process_publishes_at_the_same_moment_is_kept(tmp_path, monkeypatch, call):
    made, theirs = tmp_path / "made", "theirs"
    publish = getattr(os, call)

    def late(source, target):
        if call == "rename":
            made.mkdir()
        (made / "inside" if call == "rename" else made).write_text(theirs)
        publish(source, target)

    monkeypatch.setattr(os, call, late)
    with pytest.raises(UserError, match="made exists already"), new_path(made) as path:
        if call == "rename":
            path.mkdir()
            path /= "inside"
        path.write_text("ours")
    monkeypatch.undo()
    found = made / "inside" if call == "rename" else made
    assert found.read_text() == theirs
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_file_system_without_links_takes_files_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with new_path(tmp_path / "made") as path:
        path.write_text("ours")
    assert (tmp_path / "made").read_text() == "ours"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_leftovers_of_a_killed_process_are_hidden_and_removed(tmp_path, number):
    words = [sys.executable, "-c", DIE, str(tmp_path / "out"), str(int(number))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=environment, capture_output=True, timeout=60)
    assert done.returncode != 0
    assert all(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    assert (number == signal.SIGINT) == (not list(tmp_path.iterdir()))
    with new_path(tmp_path / "out") as place:
        make_file(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("make", [new_path, new_folder])
def test_leftovers_beside_what_was_published_are_removed(tmp_path, make):
    (tmp_path / "out").write_text("whole")
    (tmp_path / ".out.partial-12345678").mkdir()
    with pytest.raises(UserError, match="exists already"), make(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), OSError("disk full")])
def test_failed_block_leaves_no_folder(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_new_folder_appears_when_complete_and_never_overwrites(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(UserError, match="out exists already"), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "out[1]"])
def test_abandoned_folders_are_removed_and_locked_ones_kept(tmp_path, name):
    abandoned = tmp_path / f".{name}.partial-12345678"
    abandoned.mkdir()
    (abandoned / "train-00000.bin").write_bytes(b"half")
    other = tmp_path / ".other.partial-12345678"
    other.mkdir()
    with new_folder(tmp_path / name) as first:
        assert not abandoned.exists()
        with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / name):
            assert first.is_dir()
            (tmp_path / name).mkdir()
        (tmp_path / name).rmdir()
    assert other.is_dir()
    assert (tmp_path / name).is_dir()


def test_a_folder_that_another_process_takes_for_abandoned_is_made_again(tmp_path, monkeypatch):
    """Before a new folder is locked, another process may lock and remove it."""
    fcntl = pytest.importorskip("fcntl")
    flock, others = fcntl.flock, []

    def after_another(file, operation):
        if not others:
            others.append(file)
            with pytest.raises(UserError, match="gives up"), new_folder(tmp_path / "out"):
                raise UserError("gives up")
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_another)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert others and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_being_published_is_not_taken_for_abandoned(tmp_path, monkeypatch):
    fsync, others = os.fsync, []

    def beside_another(descriptor):
        if not others:
            others.append(descriptor)
            with pytest.raises(UserError, match="gives up"), new_folder(tmp_path / "out"):
                raise UserError("gives up")
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", beside_another)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert others and (tmp_path / "out" / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), None])
def test_without_file_locks_nothing_of_others_is_removed(tmp_path, monkeypatch, error):
    def flock(*_):
        raise error

    module = error and SimpleNamespace(
        flock=flock, LOCK_EX=2, LOCK_NB=4
    )  # None: cannot be imported
    monkeypatch.setitem(sys.modules, "fcntl", module)
    other = tmp_path / ".out.partial-12345678"
    other.mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_to_write_is_one_line(tmp_path, code):
    line = rf"cannot write to .*/out: {os.strerror(code)}; free some space or choose another place"
    for name in ("", "file"):
        with pytest.raises(UserError, match=line), new_path(tmp_path / "out") as path:
            path.mkdir()
            raise OSError(code, os.strerror(code), *([str(path / name)] if name else []))
        assert not list(tmp_path.iterdir())


def test_errors_of_other_files_and_connections_keep_their_own_words(tmp_path):
    with pytest.raises(IsADirectoryError), new_folder(tmp_path / "out"):
        tmp_path.open()
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), TimeoutError("timed out")):
        with pytest.raises(type(error)), new_folder(tmp_path / "out"):
            raise error


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write to .*/out: .*file is not a folder"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize(("seconds", "lines"), [(1e9, ""), (0, "counting: 30%\ncounting: 100%\n")])
def test_progress_lines_without_a_terminal(capsys, monkeypatch, seconds, lines):
    monkeypatch.setattr(files, "SECONDS_BETWEEN_LINES", seconds)
    with files.progress("counting", 10) as show:
        show(3)
        show(10)
    assert capsys.readouterr() == ("", lines)


def test_a_task_without_figures_shows_its_time(capsys, monkeypatch):
    for name in ("SECONDS_BETWEEN_WAITS", "SECONDS_BETWEEN_TICKS"):
        monkeypatch.setattr(files, name, 0.01)
    with files.progress("waiting"):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("waiting: 0 s\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    items = (time.sleep(0.1 * (number == 1)) or number for number in range(1, 4))
    assert list(files.first_with_progress("waiting", items)) == [1, 2, 3]
    shown = capsys.readouterr().err
    assert "\rwaiting: 00:00" in shown and shown.endswith(" \r")  # removed at the end


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with files.progress("counting", 2_000_000) as show:
        show(500_000)
        show(2_000_000)
    assert "counting:   0%" in capsys.readouterr().err


def test_cache_folder_is_set_by_the_environment_or_in_the_home_directory(monkeypatch, tmp_path):
    for variable in ("LLAMA_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llama_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llama_jax"
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
