"""A checkpoint made ready to write: arranged for decoding, and on the devices it is to use."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.arguments import whole_number
from llama_jax.arrangement import unstack
from llama_jax.checkpoints.loading import Loaded, load
from llama_jax.config import MeshConfig
from llama_jax.parallel.sharding import make_mesh, shardings


def tensor_mesh(tensor: int) -> Mesh | None:
    """The first devices as a mesh that matrices are cut over; none for one device.

    Raises:
      UsageError: when there are not so many.
    """
    devices = jax.device_count()
    whole_number("tensor", tensor, lambda n: 1 <= n <= devices, f"1 to {devices}, the devices")
    if tensor == 1:
        return None
    return make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])


def deploy(
    checkpoint: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    max_context: int = 0,
    mesh: Mesh | None = None,
) -> Loaded:
    """What a folder holds, its model's blocks a list as decoding wants them; see `llm.LLM`.

    On a mesh each device reads its own parts, and keeps no others.
    """
    loaded = load(checkpoint, dtype, quantize=quantize, mesh=mesh)
    context = loaded.config.context_length
    expected = f"2 to {context}, the model's context; 0: all of it"
    in_range = lambda n: n == 0 or 2 <= n <= context  # noqa: E731
    max_context = whole_number("max_context", max_context, in_range, expected)
    model = unstack(loaded.model)
    if mesh is not None:
        model = jax.device_put(model, shardings(model, mesh))
    model.config = dataclasses.replace(model.config, context_length=max_context or context)
    return dataclasses.replace(loaded, model=model)
