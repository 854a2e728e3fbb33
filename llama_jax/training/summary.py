"""The lines that a run starts with, and advice for one that does not fit in memory."""

import importlib.metadata
import math
import platform
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.data.datasets import open_dataset
from llama_jax.data.sources import Sources
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.mesh import batch_shards
from llama_jax.hardware.accelerators import chip_of, machine_name, peak_flops
from llama_jax.kernels.attention import DROPS_WEIGHTS
from llama_jax.model.execution import choose_remat
from llama_jax.model.parameters import count_parameters
from llama_jax.training.step import abstract_state, attention_kernel, state_shardings


def run_summary(config: Config, mesh: Mesh, data: Sources, folder: Path, step: int) -> list[str]:
    """Return a line each on devices, model, attention, memory, batch, data, packing and run."""
    device = mesh.devices.flat[0]
    remat = choose_remat(config.run.remat, device.platform)
    batch, length = config.data.batch_size, config.data.sequence_length
    microbatches = config.optimizer.accumulation_steps
    where = f"resuming from step {step:,}" if step else "a new run"
    lines = [
        f"device    {_devices(config, mesh)}, jax {jax.__version__}",
        *_model(config),
        f"attention {_attention(config, device)}; remat {remat}",
        f"memory    {_state_bytes(config, mesh) / 1e9:.3f} GB a device for parameters and moments",
        f"batch     {config.tokens_per_step:,} tokens a step: {batch} sequences × {length} tokens"
        f" in {microbatches} microbatch{'es' if microbatches > 1 else ''}",
    ]
    for source, weight in zip(data.folders, data.weights):
        lines += _data(config, source, weight / sum(data.weights))
    lines.append(f"run       {folder}: {where}, {config.optimizer.steps:,} steps in all")
    if peak := peak_flops(device, config.run.peak_flops):
        lines.append(
            f"peak      {peak / 1e12:,.4g} TFLOP/s a device; mfu is relative to it at"
            f" {4 if config.lora.rank else 6}N + 12·L·H·Q·T FLOPs a token"
        )
    if device.platform == "cpu" and config.model.compute_dtype == "bfloat16":
        lines.append("hint      bfloat16 is slow on CPU; add --config.model.compute_dtype=float32")
    return lines


def _model(config: Config) -> list[str]:
    """Return lines on the model, and on its adapters if those are trained."""
    model, lora = config.model, config.lora
    lines = [f"model     {count_parameters(model):,} parameters, {model.compute_dtype}"]
    if lora.rank:
        trained = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(config).trainable))
        kind = model.compute_dtype if lora.base == "compute" else lora.base
        what = f"adapters of rank {lora.rank}, {trained:,} parameters, on {lora.targets}"
        lines.append(f"lora      {what}; base frozen in {kind}")
    return lines


def _data(config: Config, folder: TokenFolder, fraction: float) -> list[str]:
    """Return lines on a source, from which a fraction of the examples is drawn."""
    train, validation = folder.splits["train"], folder.splits["validation"]
    length, packed = config.data.sequence_length, None
    if config.data.packing != "none":
        packed = open_dataset(folder, "train", length, "documents")
    tokens = len(packed) * length if packed else max(train.tokens, 1)
    epochs = fraction * config.optimizer.steps * config.tokens_per_step / tokens
    share = f"{fraction:.1%} from " if fraction < 1 else ""
    lines = [
        f"data      {share}{folder.path}: {train.tokens:,} tokens ({epochs:.2f} epochs) and"
        f" {validation.tokens:,} for validation"
    ]
    if packed:
        filled = f"{packed.efficiency:.1%} of positions filled"
        lines.append(f"packing   documents in {len(packed):,} sequences, {filled}")
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
    auto = " (run.attention=auto)" if config.run.attention == "auto" else ""
    kept = ""
    if config.model.dropout and training not in DROPS_WEIGHTS:
        kept = ", whose weights are not dropped, only residuals; run.attention=xla drops both"
    mask = ""
    if config.data.packing == "documents" and training == "cudnn":
        mask = ", which reads a mask of documents from memory"
        mask += "; run.attention=triton needs none" if not config.model.dropout else ""
    return f"{training}{other}{auto}{kept}{mask}"


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
