"""Training speed: a whole optimizer step of ours beside the same step written in PyTorch.

    python benchmarks/train.py
    python benchmarks/train.py --only 15m,260k --rounds 9

One table of what this machine can do: on CPU the small models and what accumulation costs; on a
GPU or TPU the larger ones, with their MFU. Peers take turns, each in a process of its own; see
`common`. Ours runs as train.py runs it, with huge pages; PyTorch runs as it comes, and with huge
pages too.
"""

import argparse
import dataclasses
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import common
from steps import AS_MANY_AS_FIT, Job, Ours, Theirs

SHAPES = {name: common.SHAPES[name] | {"num_kv_heads": k} for name, k in common.KV_HEADS.items()}
SHAPES["110m, heads of 128"] = SHAPES["110m"] | {"num_heads": 6, "num_kv_heads": 6}
TUNED = "PyTorch compiled, huge pages"
MICROBATCHES = (4, 16)
COLUMNS = f"{'':32}{'min':>8}{'median':>8}{'max':>8} s{'tokens/s':>11}{'TFLOP/s':>9}"
COLUMNS += f"{'MFU':>7}{'peak':>9}{'ours is':>9}"


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of the table."""

    title: str
    workers: dict[
        str, tuple[Any, ...]
    ]  # by name, what makes the work and its arguments; ours first
    tokens: dict[str, int]  # of a step of each
    is_accumulation: bool = False


def beside_torch(name: str, rows: int, length: int, dtype: str, with_torch: bool) -> Part:
    """Ours and, if wanted, PyTorch's."""
    job = Job(shape=SHAPES[name], rows=rows, length=length, dtype=dtype)
    workers: dict[str, tuple[Any, ...]] = {"llama_jax": (Ours, job)}
    if with_torch:
        workers["PyTorch, eager"] = (Theirs, job, False)
        workers["PyTorch, torch.compile"] = (Theirs, job, True)
        workers[TUNED] = (Theirs, job, True)
    title = f"{name}, {rows} × {length} tokens, {dtype}"
    return Part(title, workers, dict.fromkeys(workers, job.tokens))


def accumulating(name: str, rows: int, length: int, dtype: str) -> Part:
    """Ours with few and with many microbatches of one size."""
    workers, tokens = {}, {}
    for count in MICROBATCHES:
        job = Job(
            shape=SHAPES[name],
            rows=rows * count,
            length=length,
            dtype=dtype,
            accumulation=count,
        )
        workers[f"llama_jax, {count} microbatches"] = (Ours, job)
        tokens[f"llama_jax, {count} microbatches"] = job.tokens
    return Part(f"{name}, {rows} × {length} a microbatch, {dtype}", workers, tokens, True)


def stack(name: str, rows: int, length: int) -> Part:
    """Ours alone, of as many layers as fit."""
    job = Job(shape=SHAPES[name], rows=rows, length=length, dtype="bfloat16")
    title = f"{name}-shaped, as many layers as fit, {rows} × {length} tokens, bfloat16"
    workers: dict[str, tuple[Any, ...]] = {"llama_jax": (Ours, job, AS_MANY_AS_FIT)}
    return Part(title, workers, {"llama_jax": job.tokens})


def parts(with_torch: bool) -> dict[str, dict[str, Any]]:
    """What each kind of device can measure, by name; made when it is that name's turn."""
    wide = "110m, heads of 128"
    return {
        "cpu": {
            "15m": partial(beside_torch, "15m", 8, 256, "float32", with_torch),
            "260k": partial(beside_torch, "260k", 32, 256, "float32", with_torch),
            "accumulation": partial(accumulating, "15m", 2, 256, "float32"),
        },
        "accelerator": {
            "110m": partial(beside_torch, "110m", 32, 1024, "bfloat16", with_torch),
            "110m-tpu": partial(beside_torch, wide, 32, 1024, "bfloat16", False),
            "1.1b": partial(beside_torch, "1.1b", 4, 4096, "bfloat16", False),
            "7b": partial(stack, "7b", 4, 4096),
            "accumulation-110m": partial(accumulating, "110m", 16, 1024, "bfloat16"),
        },
    }


def measure(part: Part, rounds: int, peak: float) -> None:
    """Let the workers of a part take turns, and print its rows."""
    print(f"{part.title}", flush=True)
    workers = [
        common.Worker(name, made[0] is Ours or name == TUNED, *made)
        for name, made in part.workers.items()
    ]
    for _ in range(rounds):
        for worker in workers:
            if not worker.problem:
                worker.turn()
    ours, flops = workers[0], 0.0
    for worker in workers:
        if worker.problem or not worker.seconds:
            print(f"  {worker.name:30}skipped: {worker.problem}", flush=True)
            continue
        facts = worker.facts()
        flops = facts.get("flops", flops)
        shown = _ratio(part, ours, worker) if worker is not ours and ours.seconds else ""
        print(_row(worker, part.tokens[worker.name], flops, facts, peak) + shown, flush=True)
        if worker is ours:
            print(f"    attention: {facts['attention']}; {facts['layers']} layers", flush=True)
    for worker in workers:
        worker.close()


def _row(
    worker: common.Worker, tokens: int, flops: float, facts: dict[str, Any], peak: float
) -> str:
    middle = statistics.median(worker.seconds)
    numbers = (min(worker.seconds), middle, max(worker.seconds))
    row = f"  {worker.name:30}" + "".join(f"{value:8.3f}" for value in numbers)
    row += f"  {tokens / middle:11,.0f}{flops / middle / 1e12:9.2f}"
    row += f"{flops / middle / peak:7.1%}" if peak else f"{'':7}"
    return row + f"{facts['peak'] / 1e9:6.2f} GB"


def _ratio(part: Part, ours: common.Worker, worker: common.Worker) -> str:
    """How many times as long another takes; for accumulation, for one token."""
    ratio = statistics.median(worker.seconds) / statistics.median(ours.seconds)
    if part.is_accumulation:
        ratio *= part.tokens[ours.name] / part.tokens[worker.name]
        return f"{ratio:8.2f}x a token's time"
    return f"{ratio:8.2f}x"


def main() -> None:
    """Measure what this machine can."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--only", default="", help="comma-separated names of parts; all otherwise")
    flags.add_argument("--rounds", type=int, default=5, help="turns of each peer")
    flags.add_argument("--no_peers", action="store_true", help="measure llama_jax alone")
    chosen = flags.parse_args()
    # Peers share a GPU: none may take all of its memory at once, and each may take nearly all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    platform, kind = common.heading(Path(__file__).name)
    with_torch = not chosen.no_peers and not common.missing("torch")
    only = set(filter(None, chosen.only.split(",")))
    print("MFU is (6·N + 12·L·H·Q·T) FLOP a token over the chip's peak; peak is its memory at most")
    print(f"\n{COLUMNS}")
    here = "cpu" if platform == "cpu" else "accelerator"
    for place, named in parts(with_torch).items():
        for name, make in named.items():
            if only and name not in only:
                continue
            if place != here:
                print(f"{name}: skipped; its device is of the kind {place}, here is {kind}")
                continue
            measure(make(), chosen.rounds, common.peak(kind))


if __name__ == "__main__":
    main()
