"""Data parallelism and FSDP, written out with `jax.shard_map`.

Each device computes its own sequences of the batch; the axes `data` and `fsdp` are manual, because
XLA left to itself all-reduces gradients anew for every microbatch. Along `fsdp` parameters are
sharded too (ZeRO stage 3, Rajbhandari et al. 2020): a block's are all-gathered when it runs,
forward and backward, and its gradients are reduce-scattered to the shards. The axis `tensor` stays
automatic.

Along `fsdp`, a block's parameters and gradients and the embedding's rows and their gradients are
sent in the compute dtype (sums over microbatches are float32); the gradient of the output matrix,
and along `data` all gradients, are sent in float32.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from llama_jax.distributed.mesh import RULES, automatic, batch_shards, manual, partition_spec, specs

Tree = TypeVar("Tree")

ROW_AXES = ("data", "fsdp")


def sums_over_rows(
    function: Callable[[Any, Any, Tree], Any], trainable: Any, frozen: Any, batch: Tree
) -> Any:
    """`function(trainable, frozen, batch)`, scalars summed over sequences.

    Each device computes its own sequences.
    """
    return _over_rows(lambda *args: (function(*args), ()), trainable, frozen, batch, ())[0]


def gradients_over_rows(
    function: Callable[[Any, Any, Tree], tuple[Any, Any]], trainable: Any, frozen: Any, batch: Tree
) -> tuple[Any, Any]:
    """`function(trainable, frozen, batch)` → (sums, gradients of the trainable part).

    Each device computes its own sequences. Gradients are summed once over `data` and have the
    sharding of the parameters.
    """
    return _over_rows(function, trainable, frozen, batch, trainable)


def _over_rows(
    function: Callable[[Any, Any, Tree], tuple[Any, Any]],
    trainable: Any,
    frozen: Any,
    batch: Tree,
    gradients: Any,
) -> tuple[Any, Any]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_shards(mesh) == 1:
        return function(trainable, frozen, batch)
    structure = jax.tree.structure(gradients)
    trainable, frozen, gradients = (
        _replicate_undivided(tree, mesh) for tree in (trainable, frozen, gradients)
    )
    # Axes of size 1 are made manual too: then nothing is left to XLA's partitioner.
    axes = {*ROW_AXES} | {name for name, size in mesh.shape.items() if size == 1}

    def shard(trainable: Any, frozen: Any, batch: Tree) -> tuple[Any, Any]:
        sums, gradients = function(trainable, frozen, batch)
        return jax.lax.psum(sums, ROW_AXES), _summed(gradients)

    def along(axes_of: Any) -> Any:
        return jax.tree.map(lambda spec: _only(spec, axes), specs(axes_of, mesh))

    rows = PartitionSpec(RULES["batch"])
    sums, found = jax.shard_map(
        shard,
        in_specs=(along(trainable), along(frozen), rows),
        out_specs=(PartitionSpec(), along(gradients)),
        axis_names=axes,
        check_vma=False,
    )(trainable, frozen, batch)
    return sums, jax.tree.unflatten(structure, jax.tree.leaves(found))


def _replicate_undivided(tree: Tree, mesh: AbstractMesh) -> Tree:
    """The tree, with the axis "" in place of each that `fsdp` shards but does not divide.

    A device sees one shard of a dim, and cannot tell there whether it is all of it. The groups of
    a quantized matrix are such: 9 for 576 inputs.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf
        spec = partition_spec(leaf.axes, leaf.shape, mesh)[-len(leaf.axes) :]
        axes = (axis if name == RULES.get(axis) else "" for axis, name in zip(leaf.axes, spec))
        return leaf.replace(axes=tuple(axes))

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _sharded_dims(axes: tuple[str, ...]) -> list[int]:
    """The dims that are sharded along `fsdp`, one or none, counted from the last."""
    return [dim - len(axes) for dim, axis in enumerate(axes) if RULES.get(axis) == "fsdp"]


def _only(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    """A spec restricted to some axes of the mesh."""
    return PartitionSpec(*(name if name in axes else None for name in spec))


def _summed(gradients: Tree) -> Tree:
    """Gradients summed over the axes along which their parameter is replicated."""
    sizes = manual()

    def of(leaf: nnx.Variable) -> nnx.Variable:
        replicated = ROW_AXES[: 1 if _sharded_dims(leaf.axes) else 2]
        axes = tuple(name for name in replicated if sizes[name] > 1)
        return jax.tree.map(lambda part: jax.lax.psum(part, axes) if axes else part, leaf)

    return jax.tree.map(of, gradients, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def is_sharded() -> bool:
    """Whether the program being traced sees shards of parameters along `fsdp`."""
    return manual().get("fsdp", 1) > 1


def gather(tree: Tree, dtype: Any) -> Tree:
    """A tree of parameters all-gathered along `fsdp` and cast to `dtype`.

    Its gradient is a reduce-scatter: each device keeps the sum for its own shard. Arrays of
    quantized matrices are not cast, and leaves that are no parameters pass through.
    """
    if not is_sharded():
        return tree

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):  # the key of an adapter's dropout
            return leaf
        is_exact = leaf.get_metadata("is_exact", False)

        def gathered(part: jax.Array) -> jax.Array:
            return _gathered(part if is_exact else part.astype(dtype), leaf.axes)

        return jax.tree.map(gathered, leaf)

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _gathered(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A parameter with the logical `axes`, all-gathered along `fsdp`."""
    cut = _sharded_dims(axes)
    if not cut:
        return part

    def gather(part: jax.Array) -> jax.Array:
        # Along the first dim, where shards are contiguous: along others the transpose, a
        # reduce-scatter, becomes an all-reduce on TPU, which sends twice as much.
        parts = jax.lax.all_gather(jnp.moveaxis(part, cut[0], 0), "fsdp", axis=0, tiled=True)
        return jnp.moveaxis(parts, 0, cut[0])

    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, part.shape, mesh)
    if all(name is None for name in spec):
        return gather(part)
    # Each shard of the tensor axis by itself: else XLA gathers the parameter there too.
    return jax.shard_map(
        gather, in_specs=spec, out_specs=spec, axis_names=set(automatic(mesh)), check_vma=False
    )(part)


def lookup(
    table: Any, ids_BT: jax.Array, dtype: Any, take: Callable[..., jax.Array] | None = None
) -> jax.Array:
    """The rows [B, T, D] of a table for token ids, in `dtype`; the table is never gathered.

    Along `fsdp`, each device looks up its columns for the ids of all devices, and an all-to-all
    exchanges them; along `tensor`, it looks up the ids in its shard of the vocabulary, and a psum
    adds what the devices found.

    Args:
      table: floats [V, D]; with `take`, arrays [V, ...] that are whole along `fsdp`.
      take: of (table, ids, dtype), for a table on one device that is no array of floats.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = automatic(mesh).get("tensor", 1)
    is_alone = all(size == 1 for name, size in automatic(mesh).items() if name != "tensor")
    take = take or _take
    if parts == 1 or not is_alone or _rows(table) % parts:
        return take(table, ids_BT, dtype)

    def add_up(table: Any, ids_BT: jax.Array) -> jax.Array:
        V = _rows(table)
        ids_BT = ids_BT - jax.lax.axis_index("tensor") * V
        is_here_BT1 = ((ids_BT >= 0) & (ids_BT < V))[..., None]
        found_BTD = take(table, jnp.clip(ids_BT, 0, V - 1), dtype)
        return jax.lax.psum(jnp.where(is_here_BT1, found_BTD, 0), "tensor")

    return jax.shard_map(
        add_up,
        in_specs=(PartitionSpec("tensor"), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names=set(automatic(mesh)),
        check_vma=False,
    )(table, ids_BT)


def _rows(table: Any) -> int:
    return jax.tree.leaves(table)[0].shape[0]


def _take(table_VD: jax.Array, ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """`lookup` in a table that is sharded along `fsdp` at most."""
    if not is_sharded():
        return table_VD[ids_BT].astype(dtype)
    everyones_BT = jax.lax.all_gather(ids_BT, "fsdp", axis=0, tiled=True)
    parts_BTD = table_VD[everyones_BT].astype(dtype)
    return jax.lax.all_to_all(parts_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def example_ids(count: int) -> jax.Array:
    """The index in the whole batch of each sequence that this device has; int32 [count]."""
    first = jnp.int32(0)
    for name in ROW_AXES:
        if name in manual():
            first = first * manual()[name] + jax.lax.axis_index(name)
    return first * count + jnp.arange(count, dtype=jnp.int32)
