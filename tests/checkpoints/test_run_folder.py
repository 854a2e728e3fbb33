"""The folder of a run: one run, one process, and nothing in it is overwritten."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from tiny_run import make_config

from llama_jax.checkpoints.metadata import Description, Run, read_run, write_description
from llama_jax.checkpoints.run_folder import (
    claimed,
    claimed_by_all,
    require_same_run,
    require_space,
    write_metadata,
)
from llama_jax.errors import UsageError, UserError

WAIT = """
import sys, time
from pathlib import Path
from llama_jax.checkpoints.run_folder import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""
NO_LOCKS = SimpleNamespace(flock=lambda *_: os.close(-1), LOCK_EX=2, LOCK_NB=4)  # raises OSError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "t.model").write_bytes(b"pieces")
    return tmp_path / "runs" / "ckpt"


def start(folder, tokenizer="t.model", **changes):
    """Claim the folder for a run, as a session does."""
    run = Run(config=make_config("tokens", folder, **changes), bos=True, eos=False)
    with claimed(folder):
        require_same_run(folder, run, folder.parents[1] / tokenizer)
        write_metadata(folder, run, folder.parents[1] / tokenizer)
    return run


def start_and_step(folder, **changes):
    """Start a run and take its first step."""
    run = start(folder, **changes)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_new_run_writes_its_config_and_tokenizer(folder):
    run = start(folder)
    assert read_run(folder) == run
    assert set(contents(folder)) == {"config.json", "tokenizer.model"}
    assert contents(folder)["tokenizer.model"] == b"pieces"


FREE = {
    "optimizer__steps": 30,
    "optimizer__learning_rate": 1.0,
    "data__path": "moved",
    "run__log_every": 1,
    "mesh__fsdp": 2,
}


@pytest.mark.parametrize("name", FREE)
def test_run_resumes_with_other_free_settings(folder, name):
    start(folder)
    run = start(folder, **{name: FREE[name]})
    assert read_run(folder) == run


OTHER = {"model__dropout": 0.2, "optimizer__beta2": 0.9, "data__seed": 1, "run__seed": 1}


@pytest.mark.parametrize("name", OTHER)
def test_other_run_is_refused_and_nothing_changes(folder, name):
    start_and_step(folder)
    before = contents(folder)
    key = name.replace("__", ".")
    with pytest.raises(UserError, match=rf"holds another run: {key} is .* there and {OTHER[name]}"):
        start(folder, **{name: OTHER[name]})
    assert contents(folder) == before


@pytest.mark.parametrize("name", OTHER)
def test_run_that_made_no_step_may_be_replaced(folder, name):
    start(folder)
    run = start(folder, **{name: OTHER[name]})
    assert read_run(folder) == run


def test_checkpoint_alone_makes_a_run(folder):
    start(folder)
    (folder / "20").mkdir()
    with pytest.raises(UserError, match="holds another run"):
        start(folder, run__seed=1)


def test_other_tokenizer_is_refused_and_nothing_changes(folder):
    start_and_step(folder)
    before = contents(folder)
    (folder.parents[1] / "other.model").write_bytes(b"other pieces")
    with pytest.raises(UserError, match=r"tokenizer is not the one that .* was trained with"):
        start(folder, tokenizer="other.model")
    assert contents(folder) == before


def test_killed_start_can_be_repeated(folder):
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "config.json.partial").write_text("{")
    run = start(folder)
    (folder / "tokenizer.model").unlink()  # killed between the two files
    start(folder)
    assert read_run(folder) == run
    assert set(contents(folder)) == {"config.json", "tokenizer.model"}


def test_other_runs_may_lie_in_a_folder(folder):
    folder.mkdir(parents=True)
    (folder.parent / "t.model").write_bytes(b"pieces")  # beside it, for those in it
    for name in ("15m", "smollm2"):
        start(folder / name)
    run = start(folder)
    assert read_run(folder) == run
    start(folder, run__seed=5)  # another run: this one made no step, whatever the others' names are
    (folder / "20").mkdir()
    with pytest.raises(UserError, match=r"holds another run: run.seed"):
        start(folder, run__seed=6)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.model", ".hidden"])
def test_folder_with_other_files_is_refused_untouched(folder, name):
    folder.mkdir(parents=True)
    (folder / name).write_text("mine")
    (folder / ".lock").write_text("another program's")
    with pytest.raises(UserError, match=f"is not empty and holds no run .it has '{name}'"):
        start(folder)
    assert contents(folder) == {name: b"mine"}
    assert (folder / ".lock").read_text() == "another program's"


def test_converted_model_is_refused_untouched(folder):
    folder.mkdir(parents=True)
    model = make_config("tokens", folder).model
    write_description(folder, Description(model=model, bos=True, eos=False))
    (folder / "0").mkdir()
    before = sorted(folder.rglob("*")), (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a converted model, not a run; choose") as error:
        start(folder)
    assert "\n" not in str(error.value)
    assert (sorted(folder.rglob("*")), (folder / "config.json").read_bytes()) == before


def test_unwritable_place_is_named(folder, tmp_path):
    for place, says in (
        (tmp_path / "t.model", "is a file"),
        (tmp_path / "t.model" / "below", "cannot be written .Not a directory"),
    ):
        with pytest.raises(UsageError, match=says), claimed(place):
            raise AssertionError("claimed")
    assert (tmp_path / "t.model").read_bytes() == b"pieces"


def test_one_process_at_a_time_unless_the_other_is_dead(folder):
    command = [sys.executable, "-c", WAIT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid}"), claimed(folder):
            raise AssertionError("claimed")
        process.kill()
    with claimed(folder):
        assert (folder / ".lock").read_text() == f"process {os.getpid()}\n"


@pytest.mark.parametrize("module", [None, NO_LOCKS])
def test_without_file_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, "fcntl", module)  # None: cannot be imported, as on Windows
    with claimed(tmp_path / "ckpt"):
        pass
    assert re.fullmatch(
        r"warning: .*ckpt cannot be locked \(.+\); start no other run in it\n",
        capsys.readouterr().err,
    )


def test_free_space_is_checked(tmp_path):
    require_space(tmp_path, 1000)
    with pytest.raises(UserError, match=r"a checkpoint takes 1,000,000\.0 TB; make room"):
        require_space(tmp_path, 10**18)


# ---- several processes (with real ones: test_distributed) ----


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process one of two, of which the other never answers."""

    def become(number):
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.asarray(x)[None])

    return become


def test_process_0_holds_the_folder_and_removes_its_test_file(as_process, tmp_path):
    as_process(0)
    with claimed_by_all(tmp_path / "ckpt"):
        assert [path.name for path in (tmp_path / "ckpt").iterdir()] == [".lock"]


def test_process_that_sees_another_folder_is_refused(as_process, tmp_path):
    as_process(1)
    with (
        pytest.raises(UserError, match=r"ckpt is not the folder that process 0 writes to; put"),
        claimed_by_all(tmp_path / "ckpt", patience=0.3),
    ):
        raise AssertionError("claimed")
    assert not (tmp_path / "ckpt").exists()


def test_a_tokenizer_json_takes_the_place_of_a_tokenizer_model(folder):
    start(folder)
    (folder.parents[1] / "t.json").write_bytes(b'{"model": {}}')
    start(folder, tokenizer="t.json")
    assert {"tokenizer.json"} == {name for name in contents(folder) if name.startswith("tok")}
    start_and_step(folder, tokenizer="t.json")
    with pytest.raises(UserError, match=r"not the one that .* --tokenizer .*tokenizer\.json"):
        start(folder)
