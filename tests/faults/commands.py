"""The commands that write, and how to start, disturb and check them."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import tiny_run
from readers import digest

from llama_jax.checkpoints.restore import finished_steps
from llama_jax.data.token_folder import TokenFolder
from llama_jax.formats import convert
from llama_jax.training.metrics import read_metrics

SEED = int(os.environ.get("FAULTS_SEED", "0"))
ROUNDS = 60 if os.environ.get("FAULTS") == "long" else 1  # times as many disturbances
STEPS = 40
TIMEOUT = 300


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that writes `out` in the folder that it is started in.

    Attributes:
      words: its arguments.
      result: returns what was written, equal for equal results; checks that it is complete.
      partial: a pattern of what exists only while it writes.
      resumes: what it has written counts the next time; else an existing `out` is refused.
      kills: how many times to kill it in the short form of the suite.
    """

    words: tuple[str, ...]
    result: Callable[[Path], object]
    partial: str
    resumes: bool = False
    kills: int = 5


def _run_result(folder: Path) -> object:
    sums = json.loads((folder / str(STEPS) / "meta" / "metadata").read_text())["checksums"]
    losses = {step: record["loss"] for step, record in read_metrics(folder).items()}
    return sums, losses


def _tokens_result(folder: Path) -> object:
    return TokenFolder.open(folder, full_check_bytes=2**40).fingerprint


def _model_result(source: str) -> Callable[[Path], object]:
    def result(path: Path) -> object:
        weights = convert.FORMATS[source].read(path)
        return digest([weights.config, *(tensor.read() for tensor in weights.tensors.values())])

    return result


OUT = "out"
CONVERT = ("convert.py", "--input", "model", "--no_verify", "--output", OUT, "--to")
COMMANDS = {
    "train": Command(
        ("train.py", "--config", "tiny.py", f"--config.run.checkpoint_dir={OUT}"),
        _run_result,
        f"{OUT}/*tmp*",
        resumes=True,
    ),
    "prepare": Command(
        ("prepare.py", "text.txt", "--output", OUT, "--vocab_size", "320"),
        _tokens_result,
        f".{OUT}.partial-*",
        kills=10,
    ),
    "convert to ckpt": Command((*CONVERT, "ckpt"), _model_result("ckpt"), f".{OUT}.partial-*"),
    "convert to gguf": Command((*CONVERT, "gguf"), _model_result("gguf"), f".{OUT}.partial-*"),
}


def make_inputs(place: Path) -> None:
    """Write what the commands read."""
    tiny_run.make_tokens(place / "tokens")
    tiny_run.make_text(place / "text.txt", stories=20_000)
    config = tiny_run.make_config(
        place / "tokens", OUT, optimizer__steps=STEPS, run__sample_tokens=8
    )
    tiny_run.write_config(place / "tiny.py", config)
    from tiny_weights import tiny_weights

    weights = tiny_weights(dim=96, hidden_dim=320, num_layers=12)
    convert.FORMATS["ckpt"].write(weights, place / "model", convert.Options(), lambda done: None)


def copy_inputs(place: Path, folder: Path) -> Path:
    """Return a folder that shares the inputs."""
    folder.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.name not in (OUT, "cache"):
            (folder / path.name).symlink_to(path)
    return folder


def started(command: Command, folder: Path, cache: Path, **options) -> subprocess.Popen:
    """Start a command in a folder."""
    environment = os.environ | {
        "PYTHONPATH": str(tiny_run.REPOSITORY),
        "LLAMA_JAX_CACHE": str(cache),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    door, *words = command.words
    words = [sys.executable, str(tiny_run.REPOSITORY / door), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes | options)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for a command; return its exit code and stderr."""
    stderr = process.communicate(timeout=TIMEOUT)[1]
    if stderr.endswith("KeyboardInterrupt\n") and "/llama_jax/" not in stderr:
        return -signal.SIGINT, ""  # Python itself was still starting
    assert "Traceback" not in stderr and "this is a bug" not in stderr, stderr
    assert stderr.count("\n") <= 3, stderr
    return process.returncode, stderr


def wait_for_a_moment(
    random: Random, command: Command, process: subprocess.Popen, folder: Path, seconds: float
) -> None:
    """Wait for a random moment: at any time, or just after it began to write something."""
    latest = time.monotonic() + random.uniform(0, seconds)
    if random.random() < 0.5:
        latest = time.monotonic() + TIMEOUT
        while process.poll() is None and not any(folder.glob(command.partial)):
            if time.monotonic() > latest:
                break
            time.sleep(0.001)
        latest = time.monotonic() + random.choice((0, 0.01, 0.1)) * random.random()
    while process.poll() is None and time.monotonic() < latest:
        time.sleep(0.001)


def assert_intact(command: Command, folder: Path) -> None:
    """Assert that what a disturbed command has left can be used as it is."""
    out = folder / OUT
    if command.resumes:
        for step in finished_steps(out) if out.is_dir() else []:
            found = convert.FORMATS["ckpt"].read(out / str(step))
            assert all(tensor.read().size for tensor in found.tensors.values())
    elif out.exists():
        command.result(out)
    names = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert all(name == OUT or name.startswith(f".{OUT}.partial-") for name in names), names


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Callable[[str], None] | None]:
    """Mount a file system in memory at a folder; yield a function that changes its options.

    Args:
      options: of mount, such as "size=1m" or "nr_inodes=20".

    Yields:
      None where mounting is not allowed.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True).returncode == 0:

            def change(options: str) -> None:
                words = ["mount", "-o", f"remount,{options}", str(folder)]
                subprocess.run(words, check=True, capture_output=True)

            try:
                yield change
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
            return
    yield None


def limit_files(size: int) -> Callable[[], None]:
    """Return a function for `preexec_fn` that lets no file grow beyond a size in bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
