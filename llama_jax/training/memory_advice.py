"""What to turn when a run does not fit in its devices' memory, the cheapest first.

Judges by the config alone; what fits, `plan.py` knows.
"""

from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.instruments.chips import chip_of
from llama_jax.instruments.slices import machine_name
from llama_jax.parallel.sharding import batch_parts

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
    if cuts := _more_microbatches(config, batch_parts(mesh)):
        knobs.append(f"--config.optimizer.accumulation_steps={cuts}")
    if config.run.remat != "block":
        knobs.append("--config.run.remat=block")
    if mesh.devices.size > mesh.shape["fsdp"] * mesh.shape["tensor"]:
        knobs.append("--config.mesh.fsdp=-1 --config.mesh.data=1")
    if data.batch_size > batch_parts(mesh):
        fewer = max(batch_parts(mesh), data.batch_size // 2)
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
