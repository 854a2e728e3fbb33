"""A run's folder: it is one run's, one process's, and nothing in it is overwritten."""

import os
import subprocess
import sys

import pytest
from tiny_run import make_config

from llama_jax.checkpoints.metadata import Description, Run, read_run, write_description
from llama_jax.checkpoints.run_folder import (
    claimed,
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


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "t.model").write_bytes(b"pieces")
    return tmp_path / "runs" / "ckpt"


def start(folder, tokenizer="t.model", **changes):
    """Claim the folder for a run, as a sitting does."""
    run = Run(config=make_config("tokens", folder, **changes), bos=True, eos=False)
    with claimed(folder):
        require_same_run(folder, run, folder.parents[1] / tokenizer)
        write_metadata(folder, run, folder.parents[1] / tokenizer)
    return run


def begin(folder, **changes):
    """Start a run and take its first step."""
    run = start(folder, **changes)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_new_run_is_described_so_that_it_can_be_read_back(folder):
    run = start(folder)
    assert read_run(folder) == run
    assert set(contents(folder)) == {"config.json", "tokenizer.model"}
    assert contents(folder)["tokenizer.model"] == b"pieces"


FREE = {"optimizer__steps": 30, "data__path": "moved", "run__log_every": 1, "mesh__fsdp": 2}


@pytest.mark.parametrize("name", FREE)
def test_a_run_may_go_on_with_other_habits(folder, name):
    start(folder)
    run = start(folder, **{name: FREE[name]})
    assert read_run(folder) == run


OTHER = {"model__dropout": 0.2, "optimizer__learning_rate": 1.0, "data__seed": 1, "run__seed": 1}


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_and_nothing_changes(folder, name):
    begin(folder)
    before = contents(folder)
    key = name.replace("__", ".")
    with pytest.raises(UserError, match=rf"holds another run: {key} is .* there and {OTHER[name]}"):
        start(folder, **{name: OTHER[name]})
    assert contents(folder) == before


@pytest.mark.parametrize("name", OTHER)
def test_a_start_without_a_step_binds_nobody(folder, name):
    start(folder)
    run = start(folder, **{name: OTHER[name]})
    assert read_run(folder) == run


def test_a_checkpoint_alone_makes_a_run(folder):
    start(folder)
    (folder / "20").mkdir()
    with pytest.raises(UserError, match="holds another run"):
        start(folder, run__seed=1)


def test_another_tokenizer_is_refused_and_nothing_changes(folder):
    begin(folder)
    before = contents(folder)
    (folder.parents[1] / "other.model").write_bytes(b"other pieces")
    with pytest.raises(UserError, match=r"tokenizer is not the one that .* was trained with"):
        start(folder, tokenizer="other.model")
    assert contents(folder) == before


def test_a_start_that_was_killed_can_be_repeated(folder):
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "config.json.partial").write_text("{")
    run = start(folder)
    (folder / "tokenizer.model").unlink()  # killed between the two files
    start(folder)
    assert read_run(folder) == run
    assert set(contents(folder)) == {"config.json", "tokenizer.model"}


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.model", ".hidden"])
def test_a_folder_with_anything_else_is_refused_untouched(folder, name):
    folder.mkdir(parents=True)
    (folder / name).write_text("mine")
    (folder / ".lock").write_text("another program's")
    with pytest.raises(UserError, match=f"is not empty and holds no run .it has '{name}'"):
        start(folder)
    assert contents(folder) == {name: b"mine"}
    assert (folder / ".lock").read_text() == "another program's"


def test_a_converted_model_is_refused_untouched(folder):
    folder.mkdir(parents=True)
    model = make_config("tokens", folder).model
    write_description(folder, Description(model=model, bos=True, eos=False))
    (folder / "0").mkdir()
    before = sorted(folder.rglob("*")), (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="holds a converted model, not a run; choose") as error:
        start(folder)
    assert "\n" not in str(error.value)
    assert (sorted(folder.rglob("*")), (folder / "config.json").read_bytes()) == before


def test_a_place_that_cannot_be_written_is_named(folder, tmp_path):
    for place, says in (
        (tmp_path / "t.model", "is a file"),
        (tmp_path / "t.model" / "below", "cannot be written .Not a directory"),
    ):
        with pytest.raises(UsageError, match=says), claimed(place):
            raise AssertionError("claimed")
    assert (tmp_path / "t.model").read_bytes() == b"pieces"


def test_one_process_at_a_time_and_a_dead_one_does_not_count(folder):
    command = [sys.executable, "-c", WAIT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid}"), claimed(folder):
            raise AssertionError("claimed")
        process.kill()
    with claimed(folder):
        assert (folder / ".lock").read_text() == f"process {os.getpid()}\n"


def test_room_on_the_disk_is_asked_for(tmp_path):
    require_space(tmp_path, 1000)
    with pytest.raises(UserError, match=r"a checkpoint takes 1,000,000\.0 TB; make room"):
        require_space(tmp_path, 10**18)
