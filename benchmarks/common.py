"""What the benchmarks share: model shapes, workers that take turns, and the table.

Each peer lives in a process of its own, started once and kept warm. Rounds go around the peers in
turn, so that noise of the machine hits all alike, and while one works the others sleep: their
thread pools do not fight.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from llama_jax.huge_pages import SETTING, VARIABLE

SHAPES = {
    "260k": {"vocab_size": 512, "dim": 64, "num_layers": 5, "num_heads": 8, "hidden_dim": 172},
    "15m": {"vocab_size": 32000, "dim": 288, "num_layers": 6, "num_heads": 6, "hidden_dim": 768},
    "110m": {"vocab_size": 32000, "dim": 768, "num_layers": 12, "num_heads": 12},
}
SHAPES["110m"] |= {"hidden_dim": 2048}
KV_HEADS = {"260k": 4, "15m": 6, "110m": 12}

Work = Callable[[], float]  # does the thing measured once; returns seconds


def parser(description: str, models: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks take."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--models", default=models, help=f"comma-separated, of {', '.join(SHAPES)}")
    flags.add_argument("--rounds", type=int, default=5, help="turns of each peer")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--no_peers", action="store_true", help="measure llama_jax alone")
    return flags


def model_config(name: str, context_length: int, dtype: str) -> Any:
    """Our config of a shape."""
    from llama_jax.config import ModelConfig

    return ModelConfig(
        **SHAPES[name],
        num_kv_heads=KV_HEADS[name],
        context_length=context_length,
        compute_dtype=dtype,
    )


class Worker:
    """A process that makes a `Work` once and does it whenever it is told to."""

    def __init__(self, name: str, huge_pages: bool, make: Callable[..., Work], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.name, self.seconds = name, list[float]()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with mock.patch.dict(os.environ, {VARIABLE: SETTING} if huge_pages else {}):
            self._process.start()
        theirs.close()
        self.problem = self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            return "its process died"

    def turn(self) -> None:
        """Do the work once and note its seconds."""
        self._pipe.send("go")
        answer = self._answer()
        if isinstance(answer, float):
            self.seconds.append(answer)
        else:
            self.problem = answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """What a worker's process does."""
    try:
        work = make(*arguments)
        work()  # compiles and warms up
        pipe.send(None)
        while pipe.recv() == "go":
            pipe.send(work())
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")


def compare(
    title: str,
    tokens: int,
    rounds: int,
    peers: dict[str, tuple[Any, ...]],
    huge_pages: tuple[str, ...] = (),
) -> None:
    """Let peers take turns at the same work and print how fast each was; the first is ours.

    Args:
      tokens: that one turn of each makes or learns from.
      peers: by name, a function that makes a `Work` and its arguments.
      huge_pages: the peers started with them, as `train.py` starts itself.
    """
    print(f"\n{title}, {rounds} rounds in turn", flush=True)
    workers = [Worker(name, name in huge_pages, *made) for name, made in peers.items()]
    for _ in range(rounds):
        for worker in workers:
            if not worker.problem:
                worker.turn()
    print(f"  {'':28}{'min':>9}{'median':>9}{'max':>9}  s{'tokens/s':>12}{'ours is':>10}")
    ours = statistics.median(workers[0].seconds) if workers[0].seconds else 0.0
    for worker in workers:
        if worker.problem or not worker.seconds:
            print(f"  {worker.name:28}skipped: {worker.problem}")
            continue
        middle = statistics.median(worker.seconds)
        numbers = "".join(
            f"{value:9.3f}" for value in (min(worker.seconds), middle, max(worker.seconds))
        )
        ratio = f"{middle / ours:9.2f}x" if ours and worker is not workers[0] else ""
        print(f"  {worker.name:28}{numbers}   {tokens / middle:12,.0f}{ratio}", flush=True)
    for worker in workers:
        worker.close()


def missing(*packages: str) -> str:
    """The first of some packages that is not installed, or nothing; said in a line."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its rows are left out")
            return package
    return ""


def heading(command: str) -> None:
    """Say what is measured on what; a process that ends asks JAX, so that none holds a device."""
    asked = "import jax; d = jax.devices(); print(len(d), '×', d[0].device_kind)"
    device = _output(sys.executable, "-c", asked)
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    found = {name: _version(name) for name in names}
    processor = f"{os.cpu_count()} cores of {_processor()}"
    print(f"{command}: {device}, {processor}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version}" for name, version in found.items() if version))
    here = str(Path(__file__).parent)
    changed = " with changes" if _output("git", "-C", here, "status", "--porcelain") else ""
    print(f"commit {_output('git', '-C', here, 'log', '-1', '--format=%h %cs %s')}{changed}")


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
