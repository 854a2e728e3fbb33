"""Speed of each matmul implementation, for float and quantized matrices and several row counts.

    python benchmarks/matvec.py
    python benchmarks/matvec.py --shapes 4096x4096,11008x4096 --rows 1,16 --dtype bfloat16

A matrix is outputs × inputs. One program multiplies more of them than any cache holds; times are of
one matmul, GB/s counts the bytes of the matrix as stored. `chosen` marks the implementation that
`kernels.matmul.times_quantized` uses on this backend. Implementations run in turn.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels import matmul as products
from llama_jax.kernels.int4 import Quantized
from llama_jax.quantization.rounding import to_int4, to_int8

IMPLEMENTATIONS = ("sum_lanes", "by_blocks", "multiply_and_reduce", "convert")
BYTES = {"cpu": 2**27}  # of the float matrices together; elsewhere 16 times as many
Kernel = jax.Array | Quantized
Implementation = Callable[[jax.Array, Kernel], jax.Array]


def kernels(outputs: int, inputs: int, dtype: jnp.dtype) -> dict[str, list[Kernel]]:
    """Return matrices of each kind."""
    size = outputs * inputs * dtype.itemsize
    copies = max(2, math.ceil(BYTES.get(jax.default_backend(), 2**31) / size))
    random = np.random.default_rng(0)
    drawn = random.standard_normal((outputs, inputs), np.float32)
    floats = [jnp.asarray(np.roll(drawn, copy, axis=0)) for copy in range(copies)]
    made: dict[str, list[Kernel]] = {"int8": [to_int8(kernel) for kernel in floats]}
    for group_size in (32, 64):
        made[f"int4, {group_size}"] = [to_int4(kernel, group_size) for kernel in floats]
    return {dtype.name: [kernel.astype(dtype) for kernel in floats]} | made


def implementations(kind: str, dtype: jnp.dtype) -> dict[str, Implementation]:
    """Return the implementations for a kind of matrix."""
    if kind == dtype.name:
        return {"library": lambda x, kernel: products.times_transposed(x, kernel, dtype)}
    return {name: getattr(products, name) for name in IMPLEMENTATIONS}


def compare(shape: str, rows: int, dtype: jnp.dtype, rounds: int) -> None:
    """Print the table of one shape and number of rows."""
    outputs, inputs = map(int, shape.split("x"))
    x_RI = jnp.asarray(np.random.default_rng(1).standard_normal((rows, inputs)), dtype)
    runs: dict[tuple[str, str], tuple[Any, list[Kernel]]] = {}
    for kind, all_kernels in kernels(outputs, inputs, dtype).items():
        for name, multiply in implementations(kind, dtype).items():
            if name in ("sum_lanes", "multiply_and_reduce") and rows > 4 * products.FEW:
                continue  # they would take too long
            run = jax.jit(lambda x, many, multiply=multiply: [multiply(x, one) for one in many])
            jax.block_until_ready(run(x_RI, all_kernels))
            runs[kind, name] = run, all_kernels
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, (run, all_kernels) in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(x_RI, all_kernels))
            seconds[key].append((time.perf_counter() - begun) / len(all_kernels))
    print(f"\n{outputs} × {inputs}, {rows} rows of {dtype.name}, {rounds} rounds in turn")
    print(f"  {'':34}{'min':>9}{'median':>9}  ms{'GB/s':>9}{'is faster':>12}")
    library = min(seconds[dtype.name, "library"])
    for (kind, name), taken in seconds.items():
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(runs[kind, name][1][0]))
        mark = " (chosen)" if name == chosen(rows, runs[kind, name][1][0]) else ""
        times = f"{1e3 * min(taken):9.3f}{1e3 * sorted(taken)[len(taken) // 2]:9.3f}"
        ratios = f"{held / min(taken) / 1e9:9.1f}{library / min(taken):11.2f}x"
        print(f"  {f'{kind}: {name}{mark}':34}{times}    {ratios}", flush=True)


def chosen(rows: int, kernel: Kernel) -> str:
    """Return the name of the implementation that this backend uses."""
    if not isinstance(kernel, Quantized):
        return ""
    return products.implementation_for(rows, kernel).__name__


def main() -> None:
    """Measure what the flags name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="768x768,2048x768,768x2048,32000x768")
    parser.add_argument("--rows", default="1,4,16,256")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=10)
    flags = parser.parse_args()
    common.heading(Path(__file__).name)
    for shape in flags.shapes.split(","):
        for rows in flags.rows.split(","):
            compare(shape, int(rows), jnp.dtype(flags.dtype), flags.rounds)


if __name__ == "__main__":
    main()
