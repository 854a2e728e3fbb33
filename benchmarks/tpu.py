"""What the TPU compiler predicts of decoding, prefill and training, on a machine without a TPU.

    pip install -e ".[plan]"
    python benchmarks/tpu.py
    python benchmarks/tpu.py --layers 2 --only "decode 1,prefill 16,train 110m_tpu"
    python benchmarks/tpu.py --target v5e-4 --only "decode 1,decode 16,decode 1 int4,decode 16 int4"

Compiles the engine's programs, at the width of Llama 2 7B and with few layers, for one v5e chip or
a slice, or the train step of a config for one chip, and reads the optimised program of a device.
Millions of cycles are the sum of what the compiler's cost model estimates for each instruction,
times the turns of the loops that it is in; a loop whose turns depend on data, such as that over
tokens, counts one turn. They compare programs and are no times: for a matmul of 8192³ they are 1.14
times what the chip's peak gives, for adding 1 to 90 MB 2.5 times what its bandwidth gives, a matmul
that waits for its weights counts arithmetic alone, and a custom call (splash, int4) nothing. HBM is
what is read from and written to the chip's memory in one run, see `hbm`; copies are those of more
than a megabyte, also inside fusions, where they may move nothing.
"""

import argparse
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from hbm import hbm_bytes
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.cli.config_flags import read_config
from llama_jax.config import Config, ModelConfig
from llama_jax.data.loader import abstract_batch
from llama_jax.hardware.hlo import Program, nbytes
from llama_jax.inference.decode import MAX_PREFILL_CHUNK, decoding_execution, read_chunk
from llama_jax.planning.compile import target_mesh
from llama_jax.planning.decoding import (
    MESH,
    DecodingOptions,
    abstract_model,
    abstract_state,
    trace_decoding,
)
from llama_jax.planning.targets import parse_target
from llama_jax.training.step import abstract_state as abstract_train_state
from llama_jax.training.step import jit_train_step

WIDE = {"vocab_size": 32000, "dim": 4096, "num_heads": 32, "hidden_dim": 11008}  # Llama 2 7B
WIDE |= {"num_kv_heads": 32, "context_length": 2048, "compute_dtype": "bfloat16"}
PROGRAMS = (
    "decode 1",
    "decode 16",
    "decode 1 int8",
    "decode 16 int8",
    "decode 1 int4",
    "decode 16 int4",
    "prefill 16",
    "train 110m_tpu",
)
LARGE = 1e6  # bytes of a copy that is counted


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for one device, perhaps of several, as the TPU compiler made it."""

    program: Program
    text: str  # of the program
    temporary: int  # bytes beside arguments and results
    peak: int  # bytes in use at once

    def instructions(self) -> Iterator[tuple[Any, int]]:
        """Yield each instruction, and how often one run of the program executes it."""
        for _, instruction, times in self.program.runs():
            yield instruction, times

    @property
    def cycles(self) -> int:
        """The sum of the cost model's estimates."""
        return sum(_cycles(one.attributes) * times for one, times in self.instructions())

    def copies(self, at_least: float) -> list[int]:
        """Return the bytes of each copy to another layout that has so many, as often as it runs."""
        sizes = ((nbytes(one.result), times, one.opcode) for one, times in self.instructions())
        return [
            size
            for size, times, opcode in sizes
            if opcode == "copy" and size >= at_least
            for _ in range(times)
        ]

    def turns(self) -> list[int]:
        """Return the turns of each loop; 1 where they depend on data."""
        often: dict[str, int] = {}
        for name, _, times in self.program.runs():
            often[name] = times
        found = []
        for name, one, _ in self.program.runs():
            if one.opcode == "while":
                body = re.search(r"\bbody=%?([\w.-]+)", one.attributes)
                found.append(often[body[1]] // often[name] if body else 1)
        return found

    def loops(self) -> list[tuple[int, float]]:
        """Return what each computation takes, the longest first: cycles, and the share of matmuls.

        Cycles are those of its own instructions, as often as they run; a fusion is a matmul if it
        holds one.
        """
        cycles: dict[str, list[int]] = {}
        for name, one, times in self.program.runs():
            taken = cycles.setdefault(name, [0, 0])
            taken[self._is_matmul(one)] += _cycles(one.attributes) * times
        sums = sorted(((sum(both), both[1]) for both in cycles.values()), reverse=True)
        return [(total, matmuls / total) for total, matmuls in sums if total]

    def _is_matmul(self, instruction: Any) -> bool:
        if instruction.opcode in ("convolution", "dot"):
            return True
        called = re.search(r"\bcalls=%?([\w.-]+)", instruction.attributes)
        inside = self.program.computations.get(called[1], {}) if called else {}
        return any(map(self._is_matmul, inside.values()))


def _cycles(attributes: str) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    return int(found[1]) if found else 0


def compile_decoding(
    config: ModelConfig, batch: int, quantize: str = "", target: str = "v5e-1"
) -> Compiled:
    """Compile the decode loop for one chip or a slice of them."""
    mesh = target_mesh(MESH, parse_target(target))
    with jax.set_mesh(mesh):
        traced = trace_decoding(config, DecodingOptions(batch=batch, quantize=quantize), mesh)
        return compiled(traced)


def compile_prefill(
    config: ModelConfig, batch: int, tokens: int = MAX_PREFILL_CHUNK, target: str = "v5e-1"
) -> Compiled:
    """Compile the reading of a chunk of each prompt for one chip or a slice of them."""
    mesh = target_mesh(MESH, parse_target(target))

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    with jax.set_mesh(mesh):
        traced = read_chunk.trace(
            abstract_model(config, "", mesh),
            abstract_state(config, DecodingOptions(batch=batch), mesh).cache,
            array((batch, tokens)),
            array((batch, config.dim), config.compute_dtype),
            array(()),
            array((batch,)),
            execution=decoding_execution(),
        )
        return compiled(traced)


def compile_training(config: Config, target: str = "v5e-1") -> Compiled:
    """Compile the train step of a config for a TPU slice."""
    mesh = target_mesh(config.mesh, parse_target(target))
    with jax.set_mesh(mesh):
        step = jit_train_step(config, mesh)
        return compiled(step.trace(abstract_train_state(config), abstract_batch(config)))


def compiled(traced: Any) -> Compiled:
    """Compile a traced program."""
    program = traced.lower().compile()
    text, memory = program.as_text(), program.memory_analysis()
    used = memory.temp_size_in_bytes, memory.peak_memory_in_bytes
    return Compiled(Program(text), text, *used)


def main() -> None:
    """Compile the programs and print a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", default=",".join(PROGRAMS), help="comma-separated")
    parser.add_argument("--target", default="v5e-1", help="of decoding and prefill")
    flags = parser.parse_args()
    config = ModelConfig(**WIDE, num_layers=flags.layers)
    columns = ("HBM", 12), ("temporary", 12), ("peak", 12), ("copies", 10), ("compiled in", 14)
    titles = "".join(f"{title:>{width}}" for title, width in columns)
    print(f"{'':18}{'Mcycles':>9}{titles}  of its longest loops (matmuls)")
    for name in flags.only.split(","):
        kind, what, *quantize = name.split()
        start = time.perf_counter()
        if kind == "decode":
            made = compile_decoding(config, int(what), *(quantize or [""]), target=flags.target)
        elif kind == "prefill":
            made = compile_prefill(config, int(what), target=flags.target)
        else:
            made = compile_training(read_config(what))
        seconds = time.perf_counter() - start
        print(
            f"{name:18}{made.cycles / 1e6:9.2f}{hbm_bytes(made.program) / 1e6:9.1f} MB"
            f"{made.temporary / 1e6:9.1f} MB"
            f"{made.peak / 1e6:9.1f} MB{sum(made.copies(LARGE)) / 1e6:7.0f} MB{seconds:12.0f} s  "
            + ", ".join(f"{cycles / 1e6:.2f} ({share:.0%})" for cycles, share in made.loops()[:2]),
            flush=True,
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    main()
