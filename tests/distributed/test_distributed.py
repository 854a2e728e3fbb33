"""Runs in several processes on one machine, equal to those in one, and their errors."""

import atexit
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
from compilation import xla_flags
from tiny_run import DOOR, REPOSITORY, fit, make_config, make_tokens, write_config

from llama_jax.checkpoints.restore import finished_steps
from llama_jax.distributed.processes import joined, require_joined
from llama_jax.errors import UsageError, UserError
from llama_jax.training.metrics import read_metrics

PATIENCE = 900  # seconds; nothing here takes more than a few on a machine that is not busy
STEPS = 20  # compared with a run in one process
QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"
ENVIRONMENTS = ("SLURM", "OMPI", "KUBERNETES", "TPU", "MEGASCALE", "JAX", "LLAMA_JAX")


def config_of(tokens, checkpoint_dir):
    """Return a config on four devices; its learning rate depends on no number of steps."""
    return make_config(
        tokens,
        checkpoint_dir,
        model__num_layers=1,
        optimizer__steps=STEPS,
        optimizer__min_learning_rate=1e-2,
        mesh__data=2,
        mesh__fsdp=2,
        run__eval_every=15,
        run__keep_last=1000,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tokens, a config, and a folder for each of two machines."""
    place = tmp_path_factory.mktemp("distributed")
    make_tokens(place / "tokens")
    write_config(place / "tiny.py", config_of("../tokens", "../ckpt"))
    for number in range(2):
        (place / f"machine{number}").mkdir()
    return place


STARTED = []


@pytest.fixture(scope="module", autouse=True)
def end_processes():
    """End the processes that a failed test has left."""
    yield
    for processes in STARTED:
        processes.kill()


class Processes:
    """The processes of a run, each in the working folder of its machine."""

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
                "XLA_FLAGS": xla_flags(self.devices),
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

    def stdout(self, number=0):
        """Return the lines of a process, without those of its transport."""
        lines = self.outputs[number].read_text().splitlines()
        # Threads of Gloo write at once, so that a line may begin in the middle of another's.
        return [line for line in lines if not re.search(r"\[Gloo\]|peer ranks", line)]

    def stderr(self, number=0):
        return self._errors(number).read_text()

    def wait_for(self, step):
        """Wait until process 0 has reported a step."""
        ends = time.monotonic() + PATIENCE
        while self._reported() < step:
            assert self.all[0].poll() is None, self.stderr()
            assert time.monotonic() < ends, self.stdout()
            time.sleep(0.02)

    def _reported(self):
        found = (re.match(r"step +(\d+)/.* lr ", line) for line in self.stdout())
        return max((int(match[1]) for match in found if match), default=0)

    def kill(self):
        for process in self.all:
            process.kill()
        self.codes()

    def codes(self):
        """Wait until all have ended and return their exit codes."""
        return [process.wait(PATIENCE) for process in self.all]


def by_flags(count=2):
    """Return the flags of each of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    words += (f"--timeout={PATIENCE}",)
    return [(*words, f"--process_id={number}") for number in range(count)]


def by_slurm():
    """Return the environment of each of two tasks of a job, whose number decides the port."""
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
    """Return the losses of the first steps."""
    records = read_metrics(folder)
    return [records[step]["loss"] for step in range(1, STEPS + 1)]


def copy_killed_after(step, source, target):
    """Copy a run as if it had been killed after a step was saved; only its losses so far."""
    others = [str(other) for other in finished_steps(source) if other != step]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*others, "*tmp*"))
    metrics = target / "metrics.jsonl"  # only what is computed anew can be compared
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:step]))


def folder(name):
    return f"--config.run.checkpoint_dir=../{name}"


@pytest.fixture(scope="module")
def runs(place):
    """Runs of one process, which is this one, and of two."""
    assert fit(config_of(place / "tokens", place / "one"), devices=4) == 0
    timeout = f"--timeout={PATIENCE}"
    two = Processes(place, folder("two"), "--distributed", timeout, environments=by_slurm())
    assert two.codes() == [0, 0], two.stderr()
    return two


@pytest.mark.slow
def test_two_processes_compute_the_losses_of_one(place, runs):
    assert losses(place / "two") == pytest.approx(losses(place / "one"), abs=1e-6)
    for line in ("device    4 × cpu in 2 processes", "run       ../two: a new run", "compiled"):
        assert any(found.startswith(line) for found in runs.stdout()), line
    assert runs.stdout(1) == []
    assert (runs.stderr(0), runs.stderr(1)) == ("", "")


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(place, runs, capfd):
    copy_killed_after(10, place / "two", place / "two-then-one")
    assert fit(config_of(place / "tokens", place / "two-then-one"), devices=4) == 0
    assert "resuming from step 10" in capfd.readouterr().out
    assert losses(place / "two-then-one") == pytest.approx(losses(place / "one"), abs=1e-6)


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(place, runs):
    copy_killed_after(10, place / "one", place / "one-then-two")
    two = Processes(
        place,
        folder("one-then-two"),
        "--config.optimizer.steps=1000000",
        *("--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=2"),
        own=by_flags(),
        devices=2,  # the tensor axis spans the processes: both read all rows
    )
    two.wait_for(STEPS)
    two.all[1].send_signal(signal.SIGINT)  # and by it SIGTERM; then both agree
    assert two.codes() == [143, 130]
    assert "resuming from step 10" in " ".join(two.stdout())
    assert losses(place / "one-then-two") == pytest.approx(losses(place / "one"), abs=1e-6)
    stopped = re.match(r"stopped at step ([\d,]+), saved in", two.stdout()[-1])
    assert finished_steps(place / "one-then-two")[-1] == int(stopped[1].replace(",", ""))
    assert two.stdout(1) == []
    assert (two.stderr(0), two.stderr(1)) == ("", "")


@pytest.fixture(scope="module")
def refused(place):
    """Return functions that start processes that cannot begin."""
    shutil.copytree(place / "tokens", place / "machine0" / "tokens")
    tokenizer = place / "tokens" / "tokenizer.model"
    make_tokens(place / "machine1" / "tokens", tokenizer=tokenizer, colours=("pink", "grey"))
    (first, second), (few, many) = by_flags(), by_flags()
    soon = "--timeout=3"
    faster = "--config.optimizer.learning_rate=0.1"
    return {
        "config": lambda: Processes(place, folder("config"), own=(first, (*second, faster))),
        "count": lambda: Processes(place, folder("count"), own=(few, (*many, "--num_processes=3"))),
        "data": lambda: Processes(
            place, folder("data"), "--config.data.path=tokens", own=by_flags()
        ),
        "disk": lambda: Processes(place, "--config.run.checkpoint_dir=ckpt", own=by_flags()),
        "dead": lambda: Processes(place, own=[(*by_flags()[1], soon)], count=1),
        "alone": lambda: Processes(place, own=[(*by_flags()[0], soon)], count=1),
        "nowhere": lambda: Processes(place, "--distributed", count=1),
    }


ADDRESS = r"127\.0\.0\.1:\d+"
REFUSALS = {
    "config": (1, r"process 1 has optimizer.learning_rate=0.1 and process 0 has .*=0.01; start"),
    "data": (1, r"process 1 has data.fingerprint='(\w+)' and process 0 has .*='(?!\1)\w+'; start"),
    "disk": (1, r"(process 1: )?on .*, ckpt is not the folder that process 0 writes to; put"),
    "dead": (1, rf"the coordinator at {ADDRESS} did not accept this process within 3 s; check"),
    "count": (1, "process 1 has --num_processes=3 and process 0 has --num_processes=2; start"),
    "alone": (
        1,
        rf"not all 2 processes connected to the coordinator at {ADDRESS} within 3 s; check",
    ),
    "nowhere": (2, r"this is not part of a Slurm, .* job; add --coordinator HOST:PORT --num"),
}
QUICKEST = ("config",)
LONG = ("count", "disk", "nowhere")  # the same mechanisms: the exchange before the start, arguments


def assert_refused(processes, code, expected):
    assert set(processes.codes()) == {code}
    for number in range(processes.count):
        (line,) = processes.stderr(number).splitlines()
        assert re.match(f"error: {expected}", line), line


def marks(name):
    return [pytest.mark.slow] * (name not in QUICKEST) + [pytest.mark.long] * (name in LONG)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in REFUSALS])
def test_failed_start_is_one_line_on_every_process_and_leaves_nothing(place, refused, name):
    assert_refused(refused[name](), *REFUSALS[name])
    left = {path.name for path in (place / name).glob("*")}
    assert left == ({".lock"} if name == "data" else set())
    assert not (place / "machine1" / "ckpt").exists()


@pytest.mark.slow
@pytest.mark.long  # one process has tests of this, and the loss is the same on all
def test_non_finite_loss_is_an_error_on_every_process(place):
    absurd = ("--config.optimizer.learning_rate=10", "--config.optimizer.weight_decay=10")
    absurd += ("--config.optimizer.steps=1000000",)
    message = r"step \d+ has loss .*; stopped before its update, with step \d+ saved"
    assert_refused(Processes(place, folder("loss"), *absurd, own=by_flags()), 3, message)


ARGUMENTS = {
    ("host:1", None, None): "belong together; expected all three of them, or none",
    (None, 2, 1): "belong together",
    ("", None, None): "belong together",
    ("", 2, 1): "--coordinator='' is not an address; expected HOST:PORT, such as 10.0.0.1:1234",
    ("host", 2, 1): "--coordinator='host' is not an address; expected HOST:PORT",
    ("host:x", 2, 1): "--coordinator='host:x' is not an address",
    ("a b:1", 2, 1): "--coordinator='a b:1' is not an address",
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
def test_wrong_arguments_are_an_error(arguments):
    with (
        pytest.raises(UsageError, match=re.escape(ARGUMENTS[arguments])) as error,
        joined(*arguments),
    ):
        raise AssertionError("joined")
    assert "\n" not in str(error.value)


def test_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"port {port} of this machine cannot be used .*in use"),
            joined(f"127.0.0.1:{port}", 2, 0),
        ):
            raise AssertionError("joined")


def test_one_of_several_processes_needs_distributed(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UsageError, match="this is one of 4 processes; add --distributed"):
        require_joined()


@pytest.fixture
def calls(monkeypatch):
    """Replace the start and the end of JAX's runtime and of the process; return the calls."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: calls.append("initialize"))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(atexit, "register", lambda _: calls.append("register"))
    return calls


def test_different_numbers_of_devices_are_an_error(monkeypatch, calls):
    devices = [SimpleNamespace(process_index=number) for number in (0, 0, 1, 2, 2)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    message = "process 1 has 1 devices and process 0 has 2; give"
    with pytest.raises(UserError, match=message), joined():
        raise AssertionError("joined")
    assert calls == ["initialize", "shutdown", "register"]


@pytest.mark.parametrize("is_lost", [True, False])
def test_loss_of_another_process_is_one_line(calls, is_lost):
    what = "UNKNOWN: Gloo AllGather failed: Connection closed by peer" if is_lost else "INTERNAL: x"
    error = jax.errors.JaxRuntimeError(what)
    expected = UserError if is_lost else jax.errors.JaxRuntimeError
    message = "^another process has ended; " if is_lost else what
    with pytest.raises(expected, match=message), joined():
        raise error
    assert calls == ["initialize", "shutdown", "register"]


def test_process_leaves_at_the_end(calls):
    with joined():
        assert calls == ["initialize"]
    assert calls == ["initialize", "shutdown"]
