"""What the benchmarks share: model shapes, worker processes that run in turn, and the table.

Each program runs in its own process, started once and kept warm. In each round every process runs
once, so that noise of the machine affects all alike; while one works the others sleep, so that
their thread pools do not compete.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from llama_jax.cli.startup import HUGE_PAGES, HUGE_PAGES_VARIABLE, skip_absent_tpu

SHAPES = {
    "260k": {"vocab_size": 512, "dim": 64, "num_layers": 5, "num_heads": 8, "hidden_dim": 172},
    "15m": {"vocab_size": 32000, "dim": 288, "num_layers": 6, "num_heads": 6, "hidden_dim": 768},
    "110m": {"vocab_size": 32000, "dim": 768, "num_layers": 12, "num_heads": 12},
}
SHAPES["110m"] |= {"hidden_dim": 2048}
SHAPES["135m"] = {"vocab_size": 49152, "dim": 576, "num_layers": 30, "num_heads": 9}  # SmolLM2's
SHAPES["135m"] |= {"hidden_dim": 1536}
SHAPES["1.1b"] = {"vocab_size": 32000, "dim": 2048, "num_layers": 22, "num_heads": 32}
SHAPES["1.1b"] |= {"hidden_dim": 5632}
SHAPES["7b"] = {"vocab_size": 32000, "dim": 4096, "num_layers": 32, "num_heads": 32}
SHAPES["7b"] |= {"hidden_dim": 11008}
KV_HEADS = {"260k": 4, "15m": 6, "110m": 12, "135m": 3, "1.1b": 4, "7b": 32}

UNTIED_DIM = 2048  # from this width on embeddings are not tied

skip_absent_tpu()  # libtpu, where it is installed, would print lines of errors

Work = Callable[[], float]  # runs once what is measured; returns seconds


def parser(description: str, models: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that several benchmarks take."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--models", default=models, help=f"comma-separated, of {', '.join(SHAPES)}")
    flags.add_argument("--rounds", type=int, default=5, help="runs of each program")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--no_peers", action="store_true", help="measure llama_jax alone")
    return flags


def model_config(name: str, context_length: int, dtype: str) -> Any:
    """Return the config of a shape."""
    from llama_jax.config import ModelConfig

    return ModelConfig(
        **SHAPES[name],
        num_kv_heads=KV_HEADS[name],
        context_length=context_length,
        tied_embeddings=SHAPES[name]["dim"] < UNTIED_DIM,
        compute_dtype=dtype,
    )


def random_weights(config: Any, dtype: str) -> Any:
    """Return an unstacked model with random weights, created matrix by matrix in `dtype`.

    Unstacking a float32 model would take six times the memory of the bfloat16 model.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from llama_jax.model.transformer import Llama, unstack

    shapes = jax.eval_shape(lambda: unstack(Llama(config, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(shapes)
    draw = jax.jit(
        lambda key, shape: config.init_std * jax.random.normal(key, shape, dtype),
        static_argnames="shape",
    )
    drawn = [
        jnp.ones(leaf.shape, dtype) if leaf.ndim == 1 else draw(jax.random.key(i), leaf.shape)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


class Worker:
    """A process that creates a `Work` once and runs it at each `turn`."""

    def __init__(self, name: str, huge_pages: bool, make: Callable[..., Work], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.name, self.seconds = name, list[float]()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        with mock.patch.dict(os.environ, {HUGE_PAGES_VARIABLE: HUGE_PAGES} if huge_pages else {}):
            self._process.start()
        theirs.close()
        self.problem = self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            return "its process died"

    def turn(self) -> None:
        """Run the work once and record its seconds."""
        self._pipe.send("go")
        answer = self._answer()
        if isinstance(answer, float):
            self.seconds.append(answer)
        else:
            self.problem = answer

    def facts(self) -> dict[str, Any]:
        """Return the facts of the work, and `peak`: the peak bytes of memory of its process."""
        self._pipe.send("facts")
        answer = self._answer()
        return answer if isinstance(answer, dict) else {}

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """Run in the process of a worker: create the work, then answer requests."""
    try:
        work = make(*arguments)
        work()  # compiles and warms up
        pipe.send(None)
        while True:
            pipe.send(work() if pipe.recv() == "go" else _facts(work))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")


def _facts(work: Work) -> dict[str, Any]:
    return {"peak": _peak_memory(), **getattr(work, "facts", {})}


def _peak_memory() -> int:
    """Return the peak bytes of device memory of this process; on CPU, of its own memory."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    if "jax" in sys.modules:
        stats = sys.modules["jax"].local_devices()[0].memory_stats()
        if stats:
            return int(stats["peak_bytes_in_use"])
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def compare(
    title: str,
    tokens: int,
    rounds: int,
    peers: dict[str, tuple[Any, ...]],
    huge_pages: tuple[str, ...] = (),
) -> None:
    """Run programs in turn and print their speeds; the first one is ours.

    Args:
      tokens: processed in one run of each.
      peers: by name, a function that creates a `Work`, and its arguments.
      huge_pages: names of those that use huge pages, as `train.py` does.
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
    """Return the first package that is not installed, or "", and print a line about it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its rows are skipped")
            return package
    return ""


def heading(command: str) -> tuple[str, str]:
    """Print device, versions and commit; return the devices' platform and kind.

    JAX is queried in a process that ends, so that no process holds a device.
    """
    query = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind)"
    device, _, rest = _output(sys.executable, "-c", query).partition(" ")
    count, _, kind = rest.partition(" ")
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    found = {name: _version(name) for name in names}
    processor = f"{os.cpu_count()} cores of {_processor()}"
    print(f"{command}: {count} × {kind}, {processor}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version}" for name, version in found.items() if version))
    here = str(Path(__file__).parent)
    changed = " with changes" if _output("git", "-C", here, "status", "--porcelain") else ""
    print(f"commit {_output('git', '-C', here, 'log', '-1', '--format=%h %cs %s')}{changed}")
    return device, kind


def peak(kind: str) -> float:
    """Return the dense bfloat16 peak of one device, FLOP/s, or 0 if it is not known."""
    from llama_jax.hardware.accelerators import chip_of

    chip = chip_of(kind)
    return chip.flops if chip else 0.0


def _processor() -> str:
    """Return the name of the CPU."""
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
    """Return what a command prints, or "unknown" if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
