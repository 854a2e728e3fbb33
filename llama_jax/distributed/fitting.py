"""Whether a run can be cut over a mesh of devices, found out before anything is compiled."""

import math
from collections.abc import Mapping

from llama_jax.config import Config
from llama_jax.errors import UsageError


def require_fitting(config: Config, sizes: Mapping[str, int]) -> None:
    """Each part of a run must be cut evenly over the axes of a mesh, given by name and size.

    Fewer kv heads than the tensor axis has devices are no obstacle: they are copied.

    Raises:
      UsageError: naming what does not divide, by what, and the nearest that would.
    """
    model, devices = config.model, math.prod(sizes.values())
    over_tensor = {
        f"model.num_heads={model.num_heads}": model.num_heads,
        f"the feed-forward's width (model.hidden_dim) of {model.ffn_dim}": model.ffn_dim,
        f"model.vocab_size={model.vocab_size}": model.vocab_size,
    }
    if config.mesh.sequence:
        length = config.data.sequence_length
        over_tensor[f"data.sequence_length={length} (mesh.sequence)"] = length
    _require_divisible(over_tensor, "tensor", sizes["tensor"], devices)
    _require_divisible({f"model.dim={model.dim}": model.dim}, "fsdp", sizes["fsdp"], devices)
    _require_batch(config, sizes["data"] * sizes["fsdp"])


def _require_divisible(parts: dict[str, int], axis: str, size: int, devices: int) -> None:
    """Every part must be a multiple of the axis' size."""
    for name, value in parts.items():
        if value % size:
            whole = math.gcd(devices, *parts.values())
            choices = [divisor for divisor in range(1, whole + 1) if whole % divisor == 0]
            best = min(choices, key=lambda choice: abs(math.log(choice / size)))
            raise UsageError(
                f"{name} does not divide over mesh.{axis}={size}; the nearest mesh.{axis} that"
                f" divides everything cut along it is {best}"
            )


def _require_batch(config: Config, copies: int) -> None:
    """Each microbatch must be cut evenly over the devices that share the batch."""
    batch, accumulation = config.data.batch_size, config.optimizer.accumulation_steps
    parts = copies * accumulation
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        raise UsageError(
            f"data.batch_size={batch} does not divide over {copies} devices ×"
            f" optimizer.accumulation_steps={accumulation}; the nearest that does is {nearest}"
        )
