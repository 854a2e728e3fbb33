"""Checks that a run can be sharded over a mesh, before anything is compiled."""

import math
from collections.abc import Mapping

from llama_jax.config import Config
from llama_jax.errors import UsageError


def require_fitting(config: Config, sizes: Mapping[str, int]) -> None:
    """Check that model and batch divide over the axes of a mesh.

    The tensor axis may be larger than the number of kv heads, which are then replicated.

    Args:
      sizes: of the axes "data", "fsdp" and "tensor".

    Raises:
      UsageError: with what does not divide, by what, and the nearest size that does.
    """
    model, devices = config.model, math.prod(sizes.values())
    over_tensor = {
        f"model.num_heads={model.num_heads}": model.num_heads,
        f"the feed-forward width (model.hidden_dim) of {model.ffn_dim}": model.ffn_dim,
        f"model.vocab_size={model.vocab_size}": model.vocab_size,
    }
    if config.mesh.sequence:
        length = config.data.sequence_length
        over_tensor[f"data.sequence_length={length} (mesh.sequence)"] = length
    _require_divisible(over_tensor, "tensor", sizes["tensor"], devices)
    _require_divisible({f"model.dim={model.dim}": model.dim}, "fsdp", sizes["fsdp"], devices)

    batch, accumulation = config.data.batch_size, config.optimizer.accumulation_steps
    replicas = sizes["data"] * sizes["fsdp"]
    parts = replicas * accumulation
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        raise UsageError(
            f"data.batch_size={batch} does not divide over {replicas} devices ×"
            f" optimizer.accumulation_steps={accumulation}; the nearest that does is {nearest}"
        )


def _require_divisible(dims: dict[str, int], axis: str, size: int, devices: int) -> None:
    """Raise `UsageError` unless every dim is a multiple of the size of an axis."""
    for name, dim in dims.items():
        if dim % size:
            common = math.gcd(devices, *dims.values())
            choices = [divisor for divisor in range(1, common + 1) if common % divisor == 0]
            best = min(choices, key=lambda choice: abs(math.log(choice / size)))
            raise UsageError(
                f"{name} does not divide over mesh.{axis}={size}; the nearest mesh.{axis} that"
                f" divides everything sharded over it is {best}"
            )
