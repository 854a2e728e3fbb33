"""Decoding relative to the memory's bandwidth, and prefill relative to the chip's peak FLOP/s.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --model 15m --prompt 128 --context 256
    python benchmarks/roofline.py --batch 16 --only copy,float,int8
    python benchmarks/roofline.py --flags=--xla_gpu_enable_command_buffer=+WHILE

On a GPU or TPU Llama 2 7B's shape in bfloat16, int8 and int4, with random weights; on CPU 110M in
float32. A token reads every weight once (of an untied embedding only one row) and every slot of
the cache: these bytes over the time of a token are compared with the bandwidth of a copy within the
device's memory. Prefill takes a third of the FLOPs that `flops_per_token` counts for training,
compared with the chip's dense peak. Each runs in its own process, in turn; see `common`. With
`--flags` decoding is measured once more with these added to XLA_FLAGS.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import common

COPIED = {"cpu": 2**28}  # bytes of the array that is copied; elsewhere 2 GiB
DEFAULTS = {"cpu": ("110m", "float32", 128, 512)}  # elsewhere `ACCELERATOR`
ROWS = ("copy", "float", "int8", "int4", "prefill")
ACCELERATOR = ("7b", "bfloat16", 2048, 4096)


class Measured:
    """Work that is timed, and the bytes it moves or the FLOPs it computes."""

    def __init__(self, work: common.Work, **facts: float):
        self.work, self.facts = work, facts

    def __call__(self) -> float:
        return self.work()


def copying() -> Measured:
    """Return a copy within the device's memory as work: an array is read and written once."""
    import jax
    import jax.numpy as jnp

    size = COPIED.get(jax.default_backend(), 2**31)
    held = [jnp.zeros(size // 4, jnp.float32)]
    copy = jax.jit(lambda array: array + 1, donate_argnums=0)  # new memory would cost page faults

    def work() -> float:
        begun = time.perf_counter()
        held[0] = copy(held[0]).block_until_ready()
        return time.perf_counter() - begun

    return Measured(work, bytes=2 * size)


def decoding(
    model: str,
    dtype: str,
    prompt: int,
    context: int,
    new: int,
    batch: int,
    bits: str,
    flags: str = "",
) -> Measured:
    """Return decoding as work: seconds per token of each sequence, without prefill and the first.

    Args:
      flags: for XLA, which reads them when JAX looks for devices.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax

    from llama_jax.inference.decode import cache_slots
    from llama_jax.inference.engine import Engine
    from llama_jax.inference.request import Request, SamplingParams
    from llama_jax.model.cache import KVCache
    from llama_jax.quantization import model_nbytes, quantize

    config = common.model_config(model, context, dtype)
    weights = common.random_weights(config, dtype)
    if bits:
        weights = quantize(weights, bits)
    read = model_nbytes(weights)
    if not config.tied_embeddings:
        read -= sum(leaf.nbytes for leaf in jax.tree.leaves(weights.embedding))
    slots = cache_slots(min(prompt + new, context))
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, slots))
    read += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))

    greedy = SamplingParams(temperature=0, max_tokens=new)
    request = Request(prompts=[_ids(prompt)] * batch, params=[greedy] * batch)

    def work() -> float:
        times, tokens = [], 0
        for delta in Engine(weights).generate(request):
            if delta.index == batch - 1:  # the last of those that come together
                times.append(time.perf_counter())
                tokens += len(delta.ids)
        return (times[-1] - times[0]) / (tokens - 1)

    return Measured(work, bytes=read)


def prefilling(model: str, dtype: str, prompt: int, context: int) -> Measured:
    """Return prefill of one prompt as work, up to the logits after it."""
    import jax

    from llama_jax.inference.decode import cache_slots, prefill
    from llama_jax.model.cache import KVCache
    from llama_jax.model.parameters import flops_per_token

    config = common.model_config(model, context, dtype)
    weights = common.random_weights(config, dtype)

    def work() -> float:
        cache = KVCache.empty(config, 1, cache_slots(prompt))
        begun = time.perf_counter()
        jax.block_until_ready(prefill(weights, cache, [_ids(prompt)]))
        return time.perf_counter() - begun

    return Measured(work, flops=prompt * flops_per_token(config, prompt) / 3)


def _ids(count: int) -> list[int]:
    return [1 + i % 1000 for i in range(count)]


def measure(made: dict[str, tuple[Any, ...]], rounds: int, peak: float) -> bool:
    """Run all in turn, and print a row for each; return whether all could be measured."""
    workers = [common.Worker(name, True, *arguments) for name, arguments in made.items()]
    for _ in range(rounds):
        for worker in workers:
            if not worker.problem:
                worker.turn()
    copied = plain = 0.0  # bytes per second; seconds per token of the float model
    print(f"  {'':26}{'min':>10}{'median':>10}{'max':>10}  ms{'GB':>10}{'GB/s':>8}", flush=True)
    for worker in workers:
        if worker.problem or not worker.seconds:
            print(f"  {worker.name:26}skipped: {worker.problem}", flush=True)
            continue
        facts, middle = worker.facts(), statistics.median(worker.seconds)
        times = (min(worker.seconds), middle, max(worker.seconds))
        row = f"  {worker.name:26}" + "".join(f"{1e3 * value:10.3f}" for value in times)
        if "flops" in facts:
            rate = facts["flops"] / middle
            share = f", {rate / peak:.0%} of {peak / 1e12:,.0f}" if peak else ""
            print(f"{row}      {rate / 1e12:.2f} TFLOP/s{share}", flush=True)
            continue
        rate = facts["bytes"] / middle
        row += f"    {facts['bytes'] / 1e9:8.2f}{rate / 1e9:8.0f}"
        if copied:
            plain = plain or middle
            row += f"    {rate / copied:.0%} of the copy, {plain / middle:.2f}x the speed"
        copied = copied or rate
        print(row, flush=True)
    for worker in workers:
        worker.close()
    return not any(worker.problem for worker in workers)


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help=f"of {', '.join(common.SHAPES)}")
    parser.add_argument("--dtype", default="", choices=("float32", "bfloat16"))
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the prompt")
    parser.add_argument("--context", type=int, default=0, help="tokens of the context")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sequences that are decoded together")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--flags", default="", help="for XLA: decoding with them, too")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    flags = parser.parse_args()
    # Processes share a device: none may preallocate its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platform, kind = common.heading(Path(__file__).name)
    model, dtype, prompt, context = DEFAULTS.get(platform, ACCELERATOR)
    model, dtype = flags.model or model, flags.dtype or dtype
    prompt, context = flags.prompt or prompt, flags.context or context
    shape = (model, dtype, prompt, context)
    only = flags.only.split(",") if flags.only else ROWS
    made: dict[str, tuple[Any, ...]] = {"copy": (copying,)} if "copy" in only else {}
    for name, bits in {dtype: "", "int8": "int8", "int4": "int4"}.items():
        work = (decoding, *shape, flags.new_tokens, flags.batch, bits)
        if (name if bits else "float") in only:
            made[f"token, {name}"] = work
            if flags.flags:
                made[f"token, {name}, with flags"] = (*work, flags.flags)
    if "prefill" in only:
        made[f"prefill of {prompt:,}"] = (prefilling, *shape)
    which = f", with {flags.flags}" if flags.flags else ""
    print(
        f"\n{model}, {dtype}, batch {flags.batch}, after {prompt:,} tokens, {flags.rounds} rounds"
        f" in turn{which}"
    )
    if not measure(made, flags.rounds, common.peak(kind)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
