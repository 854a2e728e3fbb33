"""The door train.py as a user meets it: what it says, what it leaves, and how it is interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from compilation import xla_flags
from tiny_run import DOOR, REPOSITORY, make_config, make_tokens, quick_runs, write_config

from llama_jax.checkpoints.restore import finished_steps
from llama_jax.cli import main as cli
from llama_jax.cli import train
from llama_jax.training.metrics import read_metrics

STEPS = 40
PATIENCE = 600  # seconds; a process takes a few on a machine that is not busy
SLOW_DISK = """
import os, runpy, sys, time
rename = os.rename
def held(source, target, **options):
    if os.path.basename(target).isdigit() and int(os.path.basename(target)) > 10:
        print("saving", flush=True)
        time.sleep(600)
    return rename(source, target, **options)
os.rename = os.replace = held
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tokens, a config and compiled programs, shared by all tests of this file."""
    place = tmp_path_factory.mktemp("door")
    make_tokens(place / "tokens")
    changes = {"model__num_layers": 1, "run__sample_tokens": 8}
    config = make_config("tokens", "ckpt", optimizer__steps=STEPS, **changes)
    write_config(place / "tiny.py", config)
    return place


def started(place, *words, devices=1, script="", **options):
    """The door in a process of its own, its output read through pipes.

    With a script, that runs the door.
    """
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "LLAMA_JAX_CACHE": str(place / "cache"),
    }
    environment |= {"XLA_FLAGS": xla_flags(devices)}
    command = [*DOOR[:1], *(["-c", script] if script else []), *DOOR[1:], "--config", "tiny.py"]
    command += words
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=place, env=environment, **pipes | options)


def finished(place, *words, **options):
    """Its exit code, stdout and stderr."""
    process = started(place, *words, **options)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def at(folder):
    return f"--config.run.checkpoint_dir={folder}"


def wait_for(process, beginning):
    """Read its lines until one begins like this; the lines read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"it ended without a line {beginning!r}: {lines} {process.stderr.read()}")


def checksums(folder, step=STEPS):
    """What a checkpoint's meta says of every array: equal for equal bits."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["checksums"]


def losses(folder):
    return {step: record["loss"] for step, record in read_metrics(folder).items()}


@pytest.fixture(scope="module")
def straight(place):
    """A run that nobody interrupted, and what it said."""
    return place / "straight", finished(place, at("straight"))


def test_a_run_ends_well_and_says_so_in_plain_lines(place, straight):
    folder, (code, stdout, stderr) = straight
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert all(any(line.startswith(word) for line in lines) for word in ("device", "model", "data"))
    assert "run       straight: a new run, 40 steps in all" in lines
    steps = [line for line in lines if line.startswith("step ") and "lr" in line]
    assert [line.split()[1] for line in steps] == [f"{step}/40" for step in range(5, 41, 5)]
    assert len([line for line in lines if "validation loss" in line]) == 4
    assert any(line.startswith("  | ") for line in lines)  # what it writes by now
    assert lines[-1].startswith("finished 40 steps in ")
    assert lines[-1].endswith("sample with: python sample.py --ckpt straight")
    assert "\r" not in stdout and "\x1b" not in stdout
    found = {path.name for path in folder.iterdir()} - {"loss.png"}
    steps = {str(step) for step in finished_steps(folder)}
    assert found == {"config.json", "tokenizer.model", "metrics.jsonl", ".lock"} | steps
    assert {"30", "35", "40"} <= steps and 3 <= len(steps) <= 4
    assert list(losses(folder)) == list(range(1, 41))
    assert (folder / "tokenizer.model").read_bytes() == (
        place / "tokens" / "tokenizer.model"
    ).read_bytes()


@pytest.mark.slow
def test_a_signal_before_compiling_saves(place):
    """`tests/faults` signals runs at other moments."""
    process = started(place, at("stopped"))
    wait_for(process, "device")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, "")
    last = stdout.splitlines()[-1]
    assert last.startswith("stopped at step 0, ") and last.endswith("goes on from there")
    assert finished_steps(place / "stopped") == [0]


@pytest.mark.slow
def test_a_closed_terminal_saves(place):
    ours, terminal = os.openpty()
    pipes = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "text": False}
    words = ("--config.optimizer.steps=1000000", "--config.run.save_every=1000000")
    process = started(place, at("closed"), *words, **pipes)
    os.close(terminal)
    shown = b""
    while b"compiled" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)  # from now on, what is written to the terminal fails
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)  # as by the shell and by the kernel
    process.wait(PATIENCE)
    last = max(losses(place / "closed"), default=0)
    assert finished_steps(place / "closed")[-1] == last


@pytest.mark.slow
def test_a_second_signal_while_saving_ends_at_once_and_older_checkpoints_are_whole(place, straight):
    """And while it saves, a second process is refused."""
    process = started(place, at("saving"), script=SLOW_DISK)
    wait_for(process, "saving")
    process.send_signal(signal.SIGTERM)  # stops, and waits for the disk
    refused = f"error: saving is in use by process {process.pid}; wait for it, or stop it\n"
    assert finished(place, at("saving")) == (1, "", refused)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE)
    kept = "ended at once; saving has step 10, from which the same command goes on\n"
    assert (process.returncode, stderr) == (143, kept)
    assert finished_steps(place / "saving") == [5, 10]
    assert list((place / "saving").glob("*tmp*"))
    code, stdout, stderr = finished(place, at("saving"))
    assert (code, stderr) == (0, "")
    assert "resuming from step 10" in stdout
    assert checksums(place / "saving") == checksums(straight[0])
    assert not list((place / "saving").glob("*tmp*"))


@pytest.fixture
def inside(place, monkeypatch, capfd):
    """Run the command in this process; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(place / "cache"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with pytest.raises(SystemExit) as end:
            cli.run(train.main)
        return end.value.code, *capfd.readouterr()

    with quick_runs(place / "cache" / "compiled"):  # the command sets the same
        yield run


def test_a_finished_run_is_left_as_it_is(place, straight, inside):
    folder, _ = straight
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, stdout, stderr = inside("--config=tiny.py", at("straight"))
    assert (code or 0, stderr) == (0, "")
    assert stdout.splitlines()[-1] == "finished: all 40 steps were made already"
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {".lock"}


TINY = ("--config=tiny.py", "--config.mesh.fsdp=2", "--config.run.checkpoint_dir=fresh")
LONG = (*TINY, "--config.model.context_length=4096", "--config.data.sequence_length=4096")
MISTAKES = {
    ("--config=tny.py",): (2, "--config=tny.py is not a file; expected one, or a name: 110m"),
    ("--config=broken.py",): (2, "broken.py:1: "),
    (*TINY, "--config.optimizer.leraning_rate=1"): (2, "did you mean 'optimizer.learning_rate'"),
    (*TINY, "--config.data.batch_size=many"): (2, "expected an integer"),
    (*TINY, "batch_size=4"): (2, "did you mean --config.data.batch_size=4"),
    (*TINY, "--profil", "1:2"): (2, "'--profil' is not understood; did you mean '--profile'?"),
    (*TINY, "--distribute"): (2, "did you mean '--distributed'?"),
    (*TINY, "--profile", "-1:2"): (2, "--profile '-1:2' cannot be parsed; expected START:STOP"),
    ("--config=headless.py",): (2, "key 'model' is missing in headless.py; expected a section"),
    (*TINY, "--distributed", "--coordinator", ""): (2, "belong together; expected all three"),
    (*TINY, "--config.data.batch_size=0"): (2, "data.batch_size=0 is out of range"),
    (*TINY, "--config.optimizer.learning_rate=nan"): (2, "learning_rate=nan is out of range"),
    (*TINY, "--config.model.dim=25"): (2, "model.dim=25 does not divide into model.num_heads=6"),
    (*TINY, "--config.model.num_kv_heads=4"): (2, "does not divide over model.num_kv_heads=4"),
    (*TINY, "--config.model.dim=18"): (2, "model.head_dim=3 is odd"),
    (*TINY, "--config.data.batch_size=12"): (
        2,
        "over 8 devices × optimizer.accumulation_steps=1; the nearest that does is 16",
    ),
    (*TINY, "--config.optimizer.accumulation_steps=2"): (2, "the nearest that does is 16"),
    (*TINY, "--config.mesh.tensor=3"): (2, "do not multiply to 8 devices"),
    (*TINY, "--config.optimizer.warmup_steps=41"): (2, "warmup_steps=41 is longer than the run"),
    (*TINY, "--profile=5:5"): (2, "--profile '5:5' is empty"),
    (*TINY, "--profile=5:41"): (2, "--profile '5:41' goes beyond the run of optimizer.steps=40"),
    (*TINY, "--config.data.path=missing"): (
        1,
        "missing has no meta.json; create it with: python prepare.py",
    ),
    (*TINY, "--config.model.vocab_size=300"): (2, "set --config.model.vocab_size=320"),
    (*TINY, "--config.model.vocab_size=300", "--config.data.corpus=stories"): (
        2,
        "move it away, so that it is prepared again, or set --config.model.vocab_size=320",
    ),
    (*TINY, "--config.data.path=beyond"): (1, "train-00000.bin has id 320 at position 3"),
    (*TINY, "--config.data.path=cut"): (1, "expected"),
    (*LONG, "--config.data.path=short"): (1, "the train split of short has"),
    (*TINY, "--config.data.path=unheld", at("other-fresh")): (
        1,
        "the validation split of unheld has only 0 tokens",
    ),
    (*TINY, "--process_id=1"): (2, "--process_id needs --distributed"),
    (*TINY, "--distributed", "--num_processes=two"): (2, "invalid int value: 'two'"),
    (*TINY, "--distributed", "--num_processes=2"): (2, "belong together; expected all three"),
    ("--config=tiny.py", at("tiny.py")): (2, "tiny.py is a file"),
    ("--config=tiny.py", at("tiny.py/below")): (
        2,
        "tiny.py/below cannot be written (Not a directory)",
    ),
    ("--config=tiny.py", at("/proc/nothing")): (2, "/proc/nothing cannot be written"),
    ("--config=tiny.py", at("foreign")): (
        1,
        "foreign is not empty and holds no run (it has '.lock.txt')",
    ),
    ("--config=tiny.py", at("alien")): (
        1,
        "alien/config.json is damaged: it describes no llama_jax run",
    ),
    ("--config=tiny.py", at("straight"), "--config.run.seed=9"): (
        1,
        "straight holds another run: run.seed is 0 there and 9 here",
    ),
    ("--config=tiny.py", at("straight"), "--config.model.dropout=0"): (
        1,
        "straight holds another run: model.dropout",
    ),
    ("--config=tiny.py", at("straight"), "--config.data.path=other"): (
        1,
        "does not hold the data that step 40 of straight was trained",
    ),
    ("--config=tiny.py", at("straight"), "--config.data.path=apart"): (
        1,
        "tokenizer is not the one that straight was trained with",
    ),
}


@pytest.fixture(scope="module")
def mistakes(place, straight):
    """The place with everything that can be wrong in it."""
    tokens = place / "tokens"
    (place / "broken.py").write_text("def (")
    (place / "headless.py").write_text(
        "from ml_collections import ConfigDict\nget_config = ConfigDict\n"
    )
    make_tokens(place / "other", tokenizer=tokens / "tokenizer.model", colours=("pink", "grey"))
    make_tokens(place / "apart", colours=("pink", "grey"))
    make_tokens(place / "short", tokenizer=tokens / "tokenizer.model", stories=2)
    for name in ("beyond", "cut", "unheld"):
        shutil.copytree(tokens, place / name)
    shard = place / "beyond" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[6:8] = (320).to_bytes(2, "little")
    shard.write_bytes(content)
    os.truncate(place / "cut" / "train-00000.bin", 100)
    from llama_jax.data.token_folder import fingerprint

    meta = json.loads((place / "unheld" / "meta.json").read_text())
    meta["splits"]["validation"] |= {"tokens": 0, "documents": 0, "shards": []}
    meta["fingerprint"] = fingerprint(meta)
    (place / "unheld" / "meta.json").write_text(json.dumps(meta))
    for name, file in (("foreign", ".lock.txt"), ("alien", "config.json")):
        (place / name).mkdir()
        (place / name / file).write_text('{"model_type": "llama"}')
    return place


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_loses_nothing(mistakes, inside, words):
    mine = [
        path for name in ("straight", "foreign", "alien") for path in (mistakes / name).rglob("*")
    ]
    mine = {path: path.read_bytes() for path in mine if path.is_file() and path.name != ".lock"}
    code, stdout, stderr = inside(*words)
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert "compiled" not in stdout
    expected_code, expected = MISTAKES[words]
    assert expected in stderr
    assert code == expected_code
    now = {path: path.read_bytes() for path in mine}
    assert [path for path in mine if now[path] != mine[path]] == []
    assert sorted(path.name for path in (mistakes / "foreign").iterdir()) == [".lock.txt"]
