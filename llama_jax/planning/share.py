"""One device's share of a training step: its rows, its heads, its part of each parameter.

Sizes only, from the descriptions that sharding itself goes by. Does not know memory or time.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from llama_jax.attention.self_attention import chosen_backend
from llama_jax.config import Config, MeshConfig, ModelConfig
from llama_jax.instruments.chips import Chip
from llama_jax.parallel.fitting import require_fitting
from llama_jax.parallel.sharding import MESH_AXES, batch_parts, mesh_shape
from llama_jax.planning.tiles import filled_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShare(ModelConfig):
    """A model as one device of the tensor axis sees it: whole width, some heads and columns."""

    whole_head_dim: int

    @property
    def head_dim(self) -> int:
        """Width of one head: cutting heads does not change it."""
        return self.whole_head_dim


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """As much of a `jax.Device` as choosing an attention kernel asks about."""

    platform: str
    device_kind: str
    compute_capability: str = ""


def planned_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of a config on devices that are not here.

    Raises:
      UsageError: when its sizes do not multiply to the number of devices.
    """
    return AbstractMesh(
        mesh_shape(config, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def require_rows(config: Config, mesh: AbstractMesh) -> int:
    """The rows of a microbatch on one device.

    Raises:
      UsageError: when the run cannot be cut over the mesh.
    """
    require_fitting(config, mesh.shape)
    return config.microbatch_size // batch_parts(mesh)


def model_share(config: ModelConfig, tensor: int) -> ModelShare:
    """What one of `tensor` devices computes of a model; what they do not divide stays whole."""

    def part(size: int) -> int:
        return size if size % tensor else size // tensor

    heads = part(config.num_heads)
    kv_heads = config.num_kv_heads // math.gcd(config.num_kv_heads, tensor)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    fields |= {
        "num_heads": heads,
        "num_kv_heads": kv_heads if heads < config.num_heads else config.num_kv_heads,
        "hidden_dim": part(config.ffn_dim),
        "vocab_size": part(config.vocab_size),
    }
    return ModelShare(**fields, whole_head_dim=config.head_dim)


def attention_backend(config: Config, chip: Chip) -> str:
    """The attention kernel that a run would choose on a chip."""
    platform = "tpu" if chip.is_tpu else "gpu"
    device = PlannedDevice(platform, chip.kinds[0], chip.capability)
    dropout = config.model.dropout
    return chosen_backend(config.run.attention, config.model, device, dropout)  # type: ignore[arg-type]


def bytes_on_one(tree: Any, places: Any, *, is_tpu: bool) -> int:
    """Bytes that one device takes for a tree of shaped leaves with a sharding each."""
    numbers = filled_up if is_tpu else math.prod
    sizes = jax.tree.map(
        lambda leaf, place: numbers(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        places,
    )
    return sum(jax.tree.leaves(sizes))
