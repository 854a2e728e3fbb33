"""Seconds of a training step by what is trained, and by how the frozen weights are stored.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --models 15m,110m --sequences 4 --length 256 --rounds 8

"full" trains all weights; the others train adapters of rank 16 in every linear layer, on a base in
float32, bfloat16, int8, int4 or NF4. GB are those of the state that is held between steps. Steps
run in turn, in one process.
"""

import argparse
import dataclasses
import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from llama_jax.data.loader import Batch
from llama_jax.distributed.mesh import make_mesh
from llama_jax.training.step import jit_programs

BASES = ("float32", "bfloat16", "int8", "int4", "nf4")


def config_of(model: Any, flags: argparse.Namespace, base: str) -> Config:
    """Return the config of a step; base "": all weights are trained."""
    return Config(
        model=dataclasses.replace(model, context_length=flags.length),
        data=DataConfig(path="none", batch_size=flags.sequences, sequence_length=flags.length),
        optimizer=OptimizerConfig(steps=10_000, learning_rate=1e-4, warmup_steps=0),
        mesh=MeshConfig(data=1),
        run=RunConfig(init_from="none", remat=flags.remat),
        lora=LoraConfig(rank=16, base=base) if base else LoraConfig(),
    )


class Step:
    """A step, compiled and warm."""

    def __init__(self, config: Config):
        self.mesh = make_mesh(config.mesh, jax.devices()[:1])
        self.programs = jit_programs(config, self.mesh)
        with jax.set_mesh(self.mesh):
            self.state = self.programs.init()
        self.nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        shape = config.data.batch_size, config.data.sequence_length + 1
        ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
        self.batch = Batch(
            inputs_BT=jnp.asarray(ids[:, :-1]),
            targets_BT=jnp.asarray(ids[:, 1:]),
            weights_BT=jnp.ones((shape[0], shape[1] - 1), jnp.float32),
            segments_BT=None,
        )
        self.run()

    def run(self) -> float:
        """Return the seconds of one step."""
        begun = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.programs.train(self.state, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begun


def main() -> None:
    """Print a table for each model."""
    parser = common.parser(__doc__, "260k,15m")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--bases", default=",".join(BASES), help="comma-separated storages")
    flags = parser.parse_args()
    bases = flags.bases.split(",")
    for name in flags.models.split(","):
        model = common.model_config(name, flags.length, flags.dtype)
        steps = {base: Step(config_of(model, flags, base)) for base in ("", *bases)}
        seconds: dict[str, list[float]] = {base: [] for base in steps}
        for _ in range(flags.rounds):
            for base, step in steps.items():
                seconds[base].append(step.run())
        tokens = flags.sequences * flags.length
        print(f"\n{name}, {flags.sequences} × {flags.length} tokens, {flags.rounds} rounds in turn")
        print(f"  {'':16}{'min':>9}{'median':>9}  ms{'tokens/s':>10}{'of full':>9}{'GB':>8}")
        full = min(seconds[""])
        for base, taken in seconds.items():
            label = f"adapters, {base}" if base else "full"
            figures = f"{1e3 * min(taken):9.1f}{1e3 * sorted(taken)[len(taken) // 2]:9.1f}    "
            rates = f"{tokens / min(taken):10,.0f}{min(taken) / full:9.2f}"
            print(f"  {label:18}{figures}{rates}{steps[base].nbytes / 1e9:8.3f}", flush=True)


if __name__ == "__main__":
    main()
