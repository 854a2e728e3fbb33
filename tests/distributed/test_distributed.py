"""Several processes on one machine: one run, whoever computes it, and plain words when it fails."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import jax
import pytest
from tiny_run import DOOR, REPOSITORY, make_config, make_tokens, write_config

from llama_jax.checkpoints.restore import finished_steps
from llama_jax.distributed import processes as distributed
from llama_jax.distributed.processes import _require_equal_devices, joined, require_joined
from llama_jax.errors import UsageError, UserError
from llama_jax.training.metrics import read_metrics

PATIENCE = 900  # seconds; nothing here takes more than a few on a machine that is not busy
STEPS = 20  # compared with a run in one process
QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"
ENVIRONMENTS = ("SLURM", "OMPI", "KUBERNETES", "TPU", "MEGASCALE", "JAX", "LLAMA_JAX")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tokens, a config, and a folder for each of two machines."""
    place = tmp_path_factory.mktemp("distributed")
    make_tokens(place / "tokens")
    config = make_config(
        "../tokens",
        "../ckpt",
        optimizer__steps=1_000_000,
        mesh__data=2,
        mesh__fsdp=2,
        run__eval_every=15,
    )
    write_config(place / "tiny.py", config)
    for number in range(2):
        (place / f"machine{number}").mkdir()
    return place


STARTED = []


@pytest.fixture(scope="module", autouse=True)
def nobody_stays():
    """Ends what a test that failed has left."""
    yield
    for processes in STARTED:
        processes.kill()


class Processes:
    """A run's processes, each in the working folder of its machine, with devices in all."""

    def __init__(self, place, *words, count=2, devices=4, own=((), ()), environments=({}, {})):
        self.place, self.count, self.devices = place, count, devices // count
        self.outputs = [place / f"{time.monotonic_ns()}-{number}.out" for number in range(count)]
        STARTED.append(self)
        self.all = [
            self._start(number, [*words, *own[number]], environments[number])
            for number in range(count)
        ]

    def _start(self, number, words, environment):
        kept = {k: v for k, v in os.environ.items() if k.split("_")[0] not in ENVIRONMENTS}
        environment = (
            kept
            | environment
            | {
                "PYTHONPATH": str(REPOSITORY),
                "JAX_PLATFORMS": "cpu",
                "LLAMA_JAX_CACHE": str(self.place / "cache"),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}",
                QUICKLY: os.environ[QUICKLY],  # or not; see conftest
                "TF_CPP_MIN_LOG_LEVEL": "2",
            }
        )
        with self.outputs[number].open("w") as output, self._errors(number).open("w") as errors:
            return subprocess.Popen(
                [*DOOR, "--config=../tiny.py", *words],
                cwd=self.place / f"machine{number}",
                env=environment,
                stdout=output,
                stderr=errors,
            )

    def _errors(self, number):
        return self.outputs[number].with_suffix(".err")

    def said(self, number=0):
        """What a process has said; its transport's own lines are not ours."""
        lines = self.outputs[number].read_text().splitlines()
        return [line for line in lines if not line.startswith("[Gloo]")]

    def complained(self, number=0):
        return self._errors(number).read_text()

    def wait_for(self, step):
        """Until process 0 has reported a step."""
        ends = time.monotonic() + PATIENCE
        while self._reported() < step:
            assert self.all[0].poll() is None, self.complained()
            assert time.monotonic() < ends, self.said()
            time.sleep(0.02)

    def _reported(self):
        found = (re.match(r"step +(\d+)/.* lr ", line) for line in self.said())
        return max((int(match[1]) for match in found if match), default=0)

    def kill(self):
        for process in self.all:
            process.kill()
        self.codes()

    def codes(self):
        """Their exit codes, once all have ended."""
        return [process.wait(PATIENCE) for process in self.all]


def by_hand(count=2):
    """What tells each of two processes who it is."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    words += (f"--timeout={PATIENCE}",)
    return [(*words, f"--process_id={number}") for number in range(count)]


def by_slurm():
    """The environment of each of two tasks of a job, whose number decides the port."""
    for port in range(65535, 61440, -1):
        try:
            socket.create_server(("127.0.0.1", port)).close()
            break
        except OSError:
            continue
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2"}
    return [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]


def losses(folder):
    """Those of the first steps."""
    records = read_metrics(folder)
    return [records[step]["loss"] for step in range(1, STEPS + 1)]


def as_killed_after(step, source, target):
    """A copy of a run as if it had been killed once a step was saved."""
    others = [str(other) for other in finished_steps(source) if other != step]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*others, "*tmp*"))


def folder(name):
    return f"--config.run.checkpoint_dir=../{name}"


@pytest.fixture(scope="module")
def runs(place):
    """A run in one process and one in two, both killed after some steps."""
    keep = "--config.run.keep_last=1000"
    one = Processes(place, folder("one"), keep, count=1)
    timeout = f"--timeout={PATIENCE}"
    two = Processes(place, folder("two"), keep, "--distributed", timeout, environments=by_slurm())
    one.wait_for(STEPS)
    two.wait_for(STEPS)
    one.kill()
    two.kill()
    return one, two


def test_two_processes_are_one_run(place, runs):
    _, two = runs
    assert losses(place / "two") == pytest.approx(losses(place / "one"), abs=1e-6)
    for line in ("device    4 × cpu in 2 processes", "run       ../two: a new run", "compiled"):
        assert any(said.startswith(line) for said in two.said()), line
    assert two.said(1) == []
    assert (two.complained(0), two.complained(1)) == ("", "")


def go_on_from_step_10(place, run, name, **how):
    """Processes that resume what another run, killed after ten steps, has left."""
    as_killed_after(10, place / run, place / name)
    metrics = place / name / "metrics.jsonl"  # only what is computed anew can be compared
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:10]))
    processes = Processes(place, folder(name), *how.pop("words", ()), **how)
    processes.wait_for(STEPS)
    return processes


def assert_gone_on(place, processes, name):
    assert "resuming from step 10" in " ".join(processes.said())
    assert losses(place / name) == pytest.approx(losses(place / "one"), abs=1e-6)


def test_what_two_began_one_goes_on_with(place, runs):
    one = go_on_from_step_10(place, "two", "two-then-one", count=1)
    one.kill()
    assert_gone_on(place, one, "two-then-one")


@pytest.mark.slow
def test_what_one_began_two_go_on_with(place, runs):
    two = go_on_from_step_10(
        place,
        "one",
        "one-then-two",
        words=("--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=2"),
        own=by_hand(),
        devices=2,  # the tensor axis spans the processes: both read all rows
    )
    two.all[1].send_signal(signal.SIGINT)  # and by it SIGTERM; then both agree
    assert two.codes() == [143, 130]
    assert_gone_on(place, two, "one-then-two")
    stopped = re.match(r"stopped at step ([\d,]+), saved in", two.said()[-1])
    assert finished_steps(place / "one-then-two")[-1] == int(stopped[1].replace(",", ""))
    assert two.said(1) == []
    assert (two.complained(0), two.complained(1)) == ("", "")


@pytest.fixture(scope="module")
def refused(place):
    """Processes that cannot begin, started side by side."""
    shutil.copytree(place / "tokens", place / "machine0" / "tokens")
    tokenizer = place / "tokens" / "tokenizer.model"
    make_tokens(place / "machine1" / "tokens", tokenizer=tokenizer, colours=("pink", "grey"))
    (first, second), (few, many) = by_hand(), by_hand()
    soon = "--timeout=3"
    faster = "--config.optimizer.learning_rate=0.1"
    return {
        "config": Processes(place, folder("config"), own=(first, (*second, faster))),
        "count": Processes(place, folder("count"), own=(few, (*many, "--num_processes=3"))),
        "data": Processes(place, folder("data"), "--config.data.path=tokens", own=by_hand()),
        "disk": Processes(place, "--config.run.checkpoint_dir=ckpt", own=by_hand()),
        "dead": Processes(place, own=[(*by_hand()[1], soon)], count=1),
        "alone": Processes(place, own=[(*by_hand()[0], soon)], count=1),
        "nowhere": Processes(place, "--distributed", count=1),
    }


ADDRESS = r"127\.0\.0\.1:\d+"
REFUSALS = {
    "config": (1, r"process 1 has optimizer.learning_rate=0.1 and process 0 has .*=0.01; start"),
    "data": (1, r"process 1 has data.fingerprint='(\w+)' and process 0 has .*='(?!\1)\w+'; start"),
    "disk": (1, r"(process 1: )?on .*, ckpt is not the folder that process 0 writes to; put"),
    "dead": (1, rf"the coordinator at {ADDRESS} did not let this process in within 3 s; see"),
    "count": (1, "process 1 has --num_processes=3 and process 0 has --num_processes=2; start"),
    "alone": (1, rf"not all 2 processes came to the coordinator at {ADDRESS} within 3 s; see"),
    "nowhere": (2, r"no Slurm, .* job runs here; add --coordinator HOST:PORT --num_processes N"),
}


def assert_refused(processes, code, expected):
    assert set(processes.codes()) == {code}
    for number in range(processes.count):
        (line,) = processes.complained(number).splitlines()
        assert re.match(f"error: {expected}", line), line


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_on_every_process(refused, name):
    assert_refused(refused[name], *REFUSALS[name])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_told_by_every_process(place):
    absurd = ("--config.optimizer.learning_rate=10", "--config.optimizer.weight_decay=10")
    told = r"step \d+ has loss .*; stopped before its update\. The last good step is \d+"
    assert_refused(Processes(place, folder("loss"), *absurd, own=by_hand()), 3, told)


def test_a_refused_run_leaves_nothing(place, refused):
    for name in ("config", "count", "data", "disk"):
        refused[name].codes()
    assert not (place / "config").exists() and not (place / "count").exists()
    assert [path.name for path in (place / "data").iterdir()] == [".lock"]
    assert not (place / "machine1" / "ckpt").exists()


ARGUMENTS = {
    ("host:1", None, None): "go together; give all three of them, or none",
    (None, 2, 1): "go together",
    ("", None, None): "go together",
    ("", 2, 1): "--coordinator='' is not understood; expected HOST:PORT, such as 10.0.0.1:1234",
    ("host", 2, 1): "--coordinator='host' is not understood; expected HOST:PORT",
    ("host:x", 2, 1): "--coordinator='host:x' is not understood",
    ("a b:1", 2, 1): "--coordinator='a b:1' is not understood",
    (
        "host:70000",
        2,
        1,
    ): "the port of --coordinator=host:70000 is out of range; expected 1 to 65535",
    ("host:0", 2, 1): "the port of --coordinator=host:0 is out of range",
    ("host:1", 0, 0): "--num_processes=0 is out of range; expected 1 or more",
    ("host:1", 2, 2): "--process_id=2 is out of range; expected 0 to 1",
    ("host:1", 2, -1): "--process_id=-1 is out of range; expected 0 to 1",
    ("host:1", 2, 1, 0.0): "--timeout=0.0 is out of range; expected seconds above 0",
    ("host:1", 2, 1, float("nan")): "--timeout=nan is out of range",
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_arguments_that_cannot_be_are_refused_before_anybody_is_called(arguments):
    with (
        pytest.raises(UsageError, match=re.escape(ARGUMENTS[arguments])) as error,
        joined(*arguments),
    ):
        raise AssertionError("joined")
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"port {port} of this machine cannot be used .*in use"),
            joined(f"127.0.0.1:{port}", 2, 0),
        ):
            raise AssertionError("joined")


def test_one_of_several_without_distributed_is_told_so(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UsageError, match="this is one of 4 processes; add --distributed"):
        require_joined()


def test_processes_with_other_numbers_of_devices_are_refused(monkeypatch):
    devices = [SimpleNamespace(process_index=number) for number in (0, 0, 1, 2, 2)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match="process 1 has 1 devices and process 0 has 2; give"):
        _require_equal_devices()


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_process_that_loses_another_says_so_in_a_line(monkeypatch, is_lost):
    monkeypatch.setattr(distributed, "_connect", lambda *_: None)
    monkeypatch.setattr(distributed, "_require_equal_devices", lambda: None)
    left = []
    monkeypatch.setattr(distributed, "_part", lambda: left.append("parted"))
    monkeypatch.setattr(distributed, "_leave_at_exit", left.append)
    what = "UNKNOWN: Gloo AllGather failed: Connection closed by peer" if is_lost else "INTERNAL: x"
    error = jax.errors.JaxRuntimeError(what)
    expected = UserError if is_lost else jax.errors.JaxRuntimeError
    with (
        pytest.raises(expected, match="^another process has ended; " if is_lost else what),
        joined(),
    ):
        raise error
    assert left == ["parted", error]
