"""What a training step of large models takes on TPU slices: a bracket, predicted by the compiler.

    pip install -e ".[plan]"
    python benchmarks/tpu_steps.py
    python benchmarks/tpu_steps.py --only "7b v5e-16,70b v5p-64" --plans 3

No TPU runs anything. For each model and slice the plans of `plan.py --search` are ranked by the sum
of what arithmetic, memory and network take, and the first ones compiled, a minute or two each. Of
the program these are read: the cycles that the cost model gives each instruction, times the turns
of its loops; the FLOPs of attention's kernels, which it does not know; and the bytes of
collectives. The bracket:

- least: a matmul of 8192³ takes what the chip's peak gives, and all cycles are scaled with it;
  kernels run at the peak; asynchronous collectives are hidden, others use all links.
- most: a matmul reaches 85 % of the peak, kernels half of it; every collective is waited for, and
  uses half of the links, those along one axis of a torus.

MFU is that of `train.py`: the model's FLOPs, without those of recomputation, over the peak's.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator

import common
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from tpu import Compiled, compile_training, compiled

from llama_jax.cli.config_flags import read_config
from llama_jax.config import Config
from llama_jax.hardware.accelerators import GIB
from llama_jax.hardware.hlo import collectives
from llama_jax.model.parameters import flops_per_token
from llama_jax.planning.compile import required_bytes, target_mesh
from llama_jax.planning.decoding import MESH
from llama_jax.planning.memory import abstract_mesh, remat_policy
from llama_jax.planning.search import ranked
from llama_jax.planning.targets import Target, parse_target

MODELS = ("1.1b", "7b", "llama3_8b", "70b")
SLICES = ("v5e-8", "v5e-16", "v5p-64", "v6e-8", "tpu7x-16")
SIDE = 8192  # of the matmul that the cost model is calibrated with
MATMULS = {"fwd": 2, "dkv": 5}  # in attention's kernels: forward; fused backward
SMALLEST = {"v5p": 2, "tpu7x": 2}  # machines named by cores; of others one chip
LEAST_CREDIBLE = 0.001  # MFU; for tpu7x the cost model of libtpu 0.0.42.1 gives no usable cycles
REACHED, REACHED_BY_KERNELS, LINKS = 0.85, 0.5, 0.5  # of the peak, and of all links, at most


def config_of(name: str) -> Config:
    """Return the shipped config of a model, with what a search may choose left open."""
    if name != "1.1b":
        return read_config(name)
    config = read_config("7b")
    sizes = common.SHAPES[name] | {"num_kv_heads": common.KV_HEADS[name], "context_length": 2048}
    model = dataclasses.replace(config.model, **sizes)
    data = dataclasses.replace(config.data, sequence_length=2048)
    return dataclasses.replace(config, model=model, data=data)


@functools.cache
def seconds_per_cycle(chip: str) -> float:
    """Return what a cycle of the cost model takes if a large matmul runs at the chip's peak."""
    target = parse_target(f"{chip}-{SMALLEST.get(chip, 1)}")
    mesh = target_mesh(MESH, target)
    place = NamedSharding(mesh, PartitionSpec())
    matrix = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16, sharding=place)
    with jax.set_mesh(mesh):
        made = compiled(jax.jit(jnp.matmul).trace(matrix, matrix))
    return 2 * SIDE**3 / target.chip.flops / made.cycles


def kernel_flops(made: Compiled, config: Config, devices: int) -> float:
    """Return the FLOPs of attention's kernels on one device."""
    model, length = config.model, config.data.sequence_length
    heads = config.microbatch_size * model.num_heads / devices  # of one device, in all sequences
    matmul = heads * length**2 * model.head_size  # 2 · T² / 2: causal
    return sum(
        times * count * matmul
        for one, times in made.instructions()
        for part, count in MATMULS.items()
        if one.opcode == "custom-call" and "splash" in one.name and part in one.name
    )


def network(made: Compiled, target: Target) -> tuple[float, float]:
    """Return the seconds of blocking collectives and of all, over all links in one direction."""
    blocking = total = 0.0
    for one in collectives(made.text):
        seconds = one.sent(target.devices) * one.times / (target.chip.link / 2)
        total += seconds
        blocking += 0 if one.is_async else seconds
    return blocking, total


def step_seconds(made: Compiled, config: Config, target: Target) -> tuple[float, float]:
    """Return the least and the most seconds of a step."""
    chip = target.chip
    arithmetic = made.cycles * seconds_per_cycle(chip.name)
    kernels = kernel_flops(made, config, target.devices) / chip.flops
    blocking, total = network(made, target)
    least = arithmetic + kernels + blocking
    return least, arithmetic / REACHED + kernels / REACHED_BY_KERNELS + total / LINKS


def rows(name: str, target: Target, count: int) -> Iterator[str]:
    """Yield a row for each of the first plans of a model on a slice."""
    config = config_of(name)
    plans = sorted(ranked(config, target), key=lambda plan: sum(dataclasses.astuple(plan.speed)))
    if not plans:
        yield "does not fit, by estimate"
    for plan in plans[:count]:
        yield row(plan.config, target)


def row(config: Config, target: Target) -> str:
    """Return the row of a plan."""
    sizes = abstract_mesh(config.mesh, target.devices).shape.values()
    mesh = "x".join(map(str, sizes)) + "s" * config.mesh.sequence
    each = config.microbatch_size * config.data.sequence_length // target.devices
    ways = f"{mesh} {remat_policy(config, target.chip)}"
    ways = f"{ways:24}{config.optimizer.accumulation_steps:5}{each:8,}"
    begun = time.perf_counter()
    try:
        made = compile_training(config, target.name)
    except jax.errors.JaxRuntimeError as error:
        if (needed := required_bytes(str(error))) is None:
            raise
        return f"{ways}{needed / GIB:8.1f}  does not fit"
    times = step_seconds(made, config, target)
    flops = config.tokens_per_step * flops_per_token(config.model, config.data.sequence_length)
    used = [flops / (target.devices * target.chip.flops * seconds) for seconds in times]
    if used[0] < LEAST_CREDIBLE:
        return f"{ways}{made.peak / GIB:8.1f}  fits; the cost model's cycles cannot be used"
    sent = network(made, target)[1] / times[0]
    return (
        f"{ways}{made.peak / GIB:8.1f}{times[0]:9.2f} to {times[1]:.2f} s"
        f"{used[1]:8.0%} to {used[0]:.0%}{sent:9.0%}{time.perf_counter() - begun:8.0f} s"
    )


def main() -> None:
    """Compile the steps and print a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = ",".join(f"{model} {target}" for model in MODELS for target in SLICES)
    parser.add_argument("--only", default=every, help="comma-separated")
    parser.add_argument("--plans", type=int, default=1, help="of each that are compiled")
    flags = parser.parse_args()
    print("mesh: data x fsdp x tensor, s: with mesh.sequence; tokens: of a microbatch on one chip")
    print(
        f"{'':22}{'mesh, remat':24}{'micro':>5}{'tokens':>8}{'GiB':>8}{'step':>18}{'MFU':>18}"
        f"{'network':>9}{'compiled':>10}"
    )
    for name in flags.only.split(","):
        model, target = name.split()
        for line in rows(model, parse_target(target), flags.plans):
            print(f"{name:22}{line}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
    main()
