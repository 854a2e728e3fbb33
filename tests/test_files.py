"""Files and folders that are whole when they appear; folders' other rules are in test_prepare."""

import os
import signal
import subprocess
import sys

import pytest

from llama_jax.errors import UserError
from llama_jax.files import new_path

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
def test_a_path_appears_at_the_end_and_never_over_another(tmp_path, make):
    with new_path(tmp_path / "new" / "out.bin") as place:
        assert place.name == "out.bin" and not place.exists()
        make(place)
        assert not (tmp_path / "new" / "out.bin").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.bin"]
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert [path.read_text() for path in files] == ["whole"]
    with pytest.raises(UserError, match="exists already"), new_path(tmp_path / "new" / "out.bin"):
        raise AssertionError("begun")


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_leaves_nothing(tmp_path, make, error):
    with pytest.raises(type(error)), new_path(tmp_path / "new" / "out") as place:
        make(place)
        raise error
    assert not list(tmp_path.iterdir())


def test_one_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="exists already"), new_path(tmp_path / "out") as place:
        make_file(place)
        (tmp_path / "out").write_text("another's")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "another's"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_a_killed_process_leaves_looks_unfinished_and_is_cleared(tmp_path, number):
    words = [sys.executable, "-c", DIE, str(tmp_path / "out"), str(int(number))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=environment, capture_output=True, timeout=60)
    assert done.returncode != 0
    assert all(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    assert (number == signal.SIGINT) == (not list(tmp_path.iterdir()))
    with new_path(tmp_path / "out") as place:
        make_file(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
