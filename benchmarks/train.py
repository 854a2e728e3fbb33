"""Training speed: a whole optimizer step, compared with the same step in PyTorch.

    python benchmarks/train.py
    python benchmarks/train.py --only 15m,260k --rounds 9

On CPU the small models and the cost of accumulation, on a GPU or TPU the larger ones with their
MFU. Programs run in turn, each in its own process; see `common`. Ours uses huge pages, as train.py
does; PyTorch is measured without and with them.
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
DOCUMENTS = 5  # in each packed sequence
COLUMNS = f"{'':32}{'min':>8}{'median':>8}{'max':>8} s{'tokens/s':>11}{'TFLOP/s':>9}"
COLUMNS += f"{'MFU':>7}{'peak':>9}{'ours is':>9}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the table."""

    title: str
    workers: dict[
        str, tuple[Any, ...]
    ]  # by name, what creates the work, and its arguments; ours first
    tokens: dict[str, int]  # per step of each
    is_accumulation: bool = False


def compared_with_torch(
    name: str, sequences: int, length: int, dtype: str, with_torch: bool
) -> Part:
    """Return a part with our step and, with `with_torch`, PyTorch's."""
    job = Job(shape=SHAPES[name], sequences=sequences, length=length, dtype=dtype)
    workers: dict[str, tuple[Any, ...]] = {"llama_jax": (Ours, job)}
    if with_torch:
        workers["PyTorch, eager"] = (Theirs, job, False)
        workers["PyTorch, torch.compile"] = (Theirs, job, True)
        workers[TUNED] = (Theirs, job, True)
    title = f"{name}, {sequences} × {length} tokens, {dtype}"
    return Part(title, workers, dict.fromkeys(workers, job.tokens))


def accumulating(name: str, sequences: int, length: int, dtype: str) -> Part:
    """Return a part with our step at few and at many microbatches of one size."""
    workers, tokens = {}, {}
    for count in MICROBATCHES:
        job = Job(
            shape=SHAPES[name],
            sequences=sequences * count,
            length=length,
            dtype=dtype,
            accumulation=count,
        )
        workers[f"llama_jax, {count} microbatches"] = (Ours, job)
        tokens[f"llama_jax, {count} microbatches"] = job.tokens
    return Part(f"{name}, {sequences} × {length} per microbatch, {dtype}", workers, tokens, True)


def alone(
    name: str,
    sequences: int,
    length: int,
    dtype: str,
    layers: int = -1,
    documents: int = 0,
    kernels: tuple[str, ...] = ("auto",),
) -> Part:
    """Return a part with our step alone.

    Args:
      layers: as `Ours` takes it.
      documents: packed into each sequence; 0: it is not packed.
      kernels: for attention, each measured.
    """
    job = Job(
        shape=SHAPES[name], sequences=sequences, length=length, dtype=dtype, documents=documents
    )
    title = f"{name}{'-shaped, as many layers as fit' * (layers == AS_MANY_AS_FIT)}"
    title += f", {sequences} × {length} tokens, {dtype}"
    title += f", {documents} documents packed in each" * (documents > 0)
    workers: dict[str, tuple[Any, ...]] = {
        "llama_jax" if kernel == "auto" else f"llama_jax, {kernel}": (
            Ours,
            dataclasses.replace(job, attention=kernel),
            layers,
        )
        for kernel in kernels
    }
    return Part(title, workers, dict.fromkeys(workers, job.tokens))


def parts(with_torch: bool) -> dict[str, dict[str, Any]]:
    """Return by kind of device and name the functions that create the parts."""
    wide = "110m, heads of 128"
    packed = partial(alone, dtype="bfloat16", documents=DOCUMENTS, kernels=("auto", "triton"))
    return {
        "cpu": {
            "15m": partial(compared_with_torch, "15m", 8, 256, "float32", with_torch),
            "260k": partial(compared_with_torch, "260k", 32, 256, "float32", with_torch),
            "260k-packed": partial(alone, "260k", 32, 256, "float32", documents=DOCUMENTS),
            "accumulation": partial(accumulating, "15m", 2, 256, "float32"),
        },
        "accelerator": {
            "110m": partial(compared_with_torch, "110m", 32, 1024, "bfloat16", with_torch),
            "110m-tpu": partial(compared_with_torch, wide, 32, 1024, "bfloat16", False),
            "1.1b": partial(compared_with_torch, "1.1b", 4, 4096, "bfloat16", False),
            "7b": partial(alone, "7b", 4, 4096, "bfloat16", AS_MANY_AS_FIT),
            "110m-packed": partial(packed, "110m", 32, 1024),
            "1.1b-packed": partial(packed, "1.1b", 4, 4096),
            "7b-packed": partial(packed, "7b", 4, 4096, layers=AS_MANY_AS_FIT),
            "accumulation-110m": partial(accumulating, "110m", 16, 1024, "bfloat16"),
        },
    }


def measure(part: Part, rounds: int, peak: float) -> None:
    """Run the workers of a part in turn, and print its rows."""
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
        if "attention" in facts:
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
    """Return the other's time relative to ours; for accumulation, per token."""
    ratio = statistics.median(worker.seconds) / statistics.median(ours.seconds)
    if part.is_accumulation:
        ratio *= part.tokens[ours.name] / part.tokens[worker.name]
        return f"{ratio:8.2f}x per token"
    return f"{ratio:8.2f}x"


def main() -> None:
    """Measure the parts for this machine."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--only", default="", help="comma-separated names of parts; empty: all")
    flags.add_argument("--rounds", type=int, default=5, help="runs of each program")
    flags.add_argument("--no_peers", action="store_true", help="measure llama_jax alone")
    chosen = flags.parse_args()
    # Processes share a GPU: none may preallocate its memory, and each may use nearly all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    platform, kind = common.heading(Path(__file__).name)
    with_torch = not chosen.no_peers and not common.missing("torch")
    only = set(filter(None, chosen.only.split(",")))
    print("MFU is (6·N + 12·L·H·Q·T) FLOP per token over the chip's peak; peak is memory")
    print(f"\n{COLUMNS}")
    here = "cpu" if platform == "cpu" else "accelerator"
    for place, named in parts(with_torch).items():
        for name, make in named.items():
            if only and name not in only:
                continue
            if place != here:
                print(f"{name}: skipped; it needs a device of kind {place}, not {kind}")
                continue
            measure(make(), chosen.rounds, common.peak(kind))


if __name__ == "__main__":
    main()
