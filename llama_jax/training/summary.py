"""The lines that a run starts with, and advice for one that does not fit in memory."""

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


def run_summary(
    config: Config, mesh: Mesh, data: TokenFolder, folder: Path, step: int
) -> list[str]:
    """Return a line each on devices, model, attention, memory, batch, data, packing and run."""
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
            f"peak      {peak / 1e12:,.4g} TFLOP/s a device; mfu is relative to it at"
            " 6N + 12·L·H·Q·T FLOPs a token"
        )
    if device.platform == "cpu" and config.model.compute_dtype == "bfloat16":
        lines.append("hint      bfloat16 is slow on CPU; add --config.model.compute_dtype=float32")
    return lines


def _devices(config: Config, mesh: Mesh) -> str:
    """Format the number and kind of the devices, and the mesh."""
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    sequence = ", sequences sharded over tensor" if config.mesh.sequence else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.devices.size} × {kind}{processes} ({axes}{sequence})"


def _attention(config: Config, device: jax.Device) -> str:
    """Format the names of the kernels that run."""
    training = attention_kernel(config, device, training=True)
    validation = attention_kernel(config, device, training=False)
    other = f" in training, {validation} in validation" if validation != training else ""
    return f"{training}{other}" + (
        " (run.attention=auto)" if config.run.attention == "auto" else ""
    )


def _state_bytes(config: Config, mesh: Mesh) -> int:
    """Return the bytes of the training state that the first device holds."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        abstract_state(config),
        state_shardings(config, mesh),
    )
    return sum(jax.tree.leaves(sizes))


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint is written with."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


# ---- advice for a run that does not fit in memory ----

MAX_SUGGESTIONS = 3
MIN_SEQUENCE_LENGTH = 2  # that the config allows


def memory_advice(config: Config, mesh: Mesh) -> str:
    """Return a few changes of a config that save memory, and how to find out whether they suffice.

    They are chosen by the config alone, the cheapest first; `plan.py` computes what fits.
    """
    *changes, last = _memory_savers(config, mesh)[:MAX_SUGGESTIONS]
    chip = chip_of(mesh.devices.flat[0].device_kind)
    name = machine_name(chip, mesh.devices.size) if chip else ""
    target = f" --target {name}" if name else ""
    return (
        f"try {', '.join(changes)} or {last};"
        f" python plan.py --config FILE{target} computes what fits"
    )


def _memory_savers(config: Config, mesh: Mesh) -> list[str]:
    """Return the flags that can still be changed, those that keep the results first."""
    data, optimizer = config.data, config.optimizer
    flags = []
    if more := _more_microbatches(config, batch_shards(mesh)):
        flags.append(f"--config.optimizer.accumulation_steps={more}")
    if config.run.remat != "block":
        flags.append("--config.run.remat=block")
    if mesh.devices.size > mesh.shape["fsdp"] * mesh.shape["tensor"]:
        flags.append("--config.mesh.fsdp=-1 --config.mesh.data=1")
    if data.batch_size > batch_shards(mesh):
        fewer = max(batch_shards(mesh), data.batch_size // 2)
        flags.append(f"--config.data.batch_size={fewer}")
    if data.sequence_length // 2 >= MIN_SEQUENCE_LENGTH:
        flags.append(f"--config.data.sequence_length={data.sequence_length // 2}")
    if optimizer.moments_dtype == "float32":
        flags.append("--config.optimizer.moments_dtype=bfloat16")
    return [*flags, "a smaller model", f"more than {mesh.devices.size} devices"]


def _more_microbatches(config: Config, shards: int) -> int:
    """Return the next larger number of microbatches that divides the batch; 0 if there is none."""
    B, now = config.data.batch_size // shards, config.optimizer.accumulation_steps
    return next((count for count in range(now + 1, B + 1) if B % count == 0), 0)
