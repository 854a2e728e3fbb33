"""What to turn when a run does not fit in its devices' memory, the cheapest first.

Judges by the config alone; what fits, `plan.py` knows.
"""

import importlib.metadata
import math
import platform
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.data.datasets import open_dataset
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.mesh import batch_shards
from llama_jax.hardware.accelerators import chip_of, machine_name, peak_flops
from llama_jax.model.parameters import count_parameters
from llama_jax.training.step import abstract_state, attention_kernel, state_shardings

KNOBS = 3  # to name
SHORTEST = 2  # tokens of a sequence that the config allows


def memory_advice(config: Config, mesh: Mesh) -> str:
    """A few changes of this config that make its step smaller, and how to learn if they do."""
    *knobs, last = _knobs(config, mesh)[:KNOBS]
    chip = chip_of(mesh.devices.flat[0].device_kind)
    name = machine_name(chip, mesh.devices.size) if chip else ""
    target = f" --target {name}" if name else ""
    return (
        f"try {', '.join(knobs)} or {last};"
        f" python plan.py --config FILE{target} tells beforehand what fits"
    )


def _knobs(config: Config, mesh: Mesh) -> list[str]:
    """The flags that are not at their end yet; those that keep the results come first."""
    data, optimizer = config.data, config.optimizer
    knobs = []
    if cuts := _more_microbatches(config, batch_shards(mesh)):
        knobs.append(f"--config.optimizer.accumulation_steps={cuts}")
    if config.run.remat != "block":
        knobs.append("--config.run.remat=block")
    if mesh.devices.size > mesh.shape["fsdp"] * mesh.shape["tensor"]:
        knobs.append("--config.mesh.fsdp=-1 --config.mesh.data=1")
    if data.batch_size > batch_shards(mesh):
        fewer = max(batch_shards(mesh), data.batch_size // 2)
        knobs.append(f"--config.data.batch_size={fewer}")
    if data.sequence_length // 2 >= SHORTEST:
        knobs.append(f"--config.data.sequence_length={data.sequence_length // 2}")
    if optimizer.moments_dtype == "float32":
        knobs.append("--config.optimizer.moments_dtype=bfloat16")
    return [*knobs, "a smaller model", f"more than {mesh.devices.size} devices"]


def _more_microbatches(config: Config, parts: int) -> int:
    """The next number of microbatches that the batch divides into; 0: there is none."""
    rows, now = config.data.batch_size // parts, config.optimizer.accumulation_steps
    return next((cuts for cuts in range(now + 1, rows + 1) if rows % cuts == 0), 0)


# The lines a run begins with: what is trained, on what, from what, and where to.


def introduction(
    config: Config, mesh: Mesh, data: TokenFolder, folder: Path, step: int
) -> list[str]:
    """A line each on devices, model, attention, memory, batch, data, packing and run."""
    device = mesh.devices.flat[0]
    train, validation = data.splits["train"], data.splits["validation"]
    batch, length = config.data.batch_size, config.data.sequence_length
    microbatches = config.optimizer.accumulation_steps
    packed = (
        open_dataset(data, "train", length, "documents") if config.data.packing != "none" else None
    )
    tokens = len(packed) * length if packed else max(train.tokens, 1)
    epochs = config.optimizer.steps * config.tokens_per_step / tokens
    where = f"resuming from step {step:,}" if step else "a new run"
    lines = [
        f"device    {_devices(config, mesh)}, jax {jax.__version__}",
        f"model     {count_parameters(config.model):,} parameters, {config.model.compute_dtype}",
        f"attention {_attention(config, device)}; remat {config.run.remat}",
        f"memory    {_state_bytes(config, mesh) / 1e9:.3f} GB a device for parameters and moments",
        f"batch     {config.tokens_per_step:,} tokens a step: {batch} sequences × {length} tokens"
        f" in {microbatches} microbatch{'es' if microbatches > 1 else ''}",
        f"data      {data.path}: {train.tokens:,} tokens ({epochs:.2f} epochs) and"
        f" {validation.tokens:,} for validation",
        f"run       {folder}: {where}, {config.optimizer.steps:,} steps in all",
    ]
    if packed:
        filled = f"{packed.efficiency:.1%} of positions filled"
        lines.insert(-1, f"packing   documents in {len(packed):,} sequences, {filled}")
    if peak := peak_flops(device, config.run.peak_flops):
        lines.append(
            f"peak      {peak / 1e12:,.4g} TFLOP/s a device; mfu is the share of it at"
            " 6N + 12·L·H·Q·T FLOPs a token"
        )
    if device.platform == "cpu" and config.model.compute_dtype == "bfloat16":
        lines.append("hint      bfloat16 is slow on CPU; add --config.model.compute_dtype=float32")
    return lines


def _devices(config: Config, mesh: Mesh) -> str:
    """How many devices of what kind, and how they are arranged."""
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    sequence = ", sequences cut over tensor" if config.mesh.sequence else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.devices.size} × {kind}{processes} ({axes}{sequence})"


def _attention(config: Config, device: jax.Device) -> str:
    """The names of the kernels that run."""
    training = attention_kernel(config, device, training=True)
    validation = attention_kernel(config, device, training=False)
    other = f" in training, {validation} in validation" if validation != training else ""
    return f"{training}{other}" + (
        " (run.attention=auto)" if config.run.attention == "auto" else ""
    )


def _state_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes of the training state that the first device holds."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        abstract_state(config),
        state_shardings(config, mesh),
    )
    return sum(jax.tree.leaves(sizes))


def versions() -> dict[str, str]:
    """The versions that a checkpoint was written with."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found
