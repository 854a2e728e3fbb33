"""Where arrays lie: one table from the logical axes of tensors to the axes of the device mesh.

Mesh axes are always `data`, `fsdp` and `tensor`, of size 1 when unused. The model names logical
axes only; this file is the one place that knows what they mean on devices.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import MeshConfig
from llama_jax.errors import UsageError

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "tensor")

# What each logical axis of a parameter or an activation is cut along.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "residual": None,  # activations' width; parameters call it `embed`
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that a config asks for, over all devices or those given.

    Raises:
      UsageError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes)
    if math.prod(shape) != len(devices):
        named = ", ".join(f"mesh.{name}={size}" for name, size in zip(MESH_AXES, sizes))
        raise UsageError(
            f"{named} do not arrange {len(devices)} devices; choose sizes whose product is"
            f" {len(devices)}, or set one to -1"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec of an array whose last dims lie along `axes`; leading ones (layers) are whole.

    A dim that its mesh axes do not divide is left whole: 8 kv heads on 16 devices are copied.
    """
    axes = ("",) * (len(shape) - len(axes)) + axes
    entries = []
    for axis, size in zip(axes, shape):
        target = RULES[axis] if axis else None
        names = (target,) if isinstance(target, str) else target or ()
        parts = math.prod(mesh.shape[name] for name in names)
        entries.append(target if size % parts == 0 else None)
    return PartitionSpec(*entries)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The sharding of each leaf of a tree of parameters or of optimizer state.

    A leaf inside an `nnx.Param` follows the axes described there; any other leaf is replicated.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda array: NamedSharding(mesh, partition_spec(leaf.axes, array.shape, mesh)), leaf
        )

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first dim is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """`x`, told to lie along `axes` on the mesh that is set; without a mesh, just `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def shard_heads(attention: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`attention` of [B, T, heads, H] arrays, each device doing its own rows and heads.

    For attention written as a loop, which the compiler cannot cut by itself. Heads stay whole
    unless the tensor axis divides those of every array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.axis_sizes) == 1:
        return attention(*arrays)
    divides = all(x.shape[2] % mesh.shape["tensor"] == 0 for x in arrays)
    batch = RULES["batch"] if arrays[0].shape[0] % batch_parts(mesh) == 0 else None
    spec = PartitionSpec(batch, None, "tensor" if divides else None, None)
    specs = tuple(spec for _ in arrays)
    return jax.shard_map(attention, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def place_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Global device arrays made of every process's own rows of a batch."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )
