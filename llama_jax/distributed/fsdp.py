"""Data parallelism written out: who sums gradients, and who gathers which parameters, and when.

Every device does its own rows of the batch, with `jax.shard_map` in charge of the axes `data` and
`fsdp`, because the compiler left to itself sums gradients anew for every microbatch. Along `fsdp`
parameters are cut too (ZeRO stage 3, Rajbhandari et al. 2020): a block's are gathered when it runs,
forward and backward, and its gradients summed straight into the parts. The axis `tensor` stays with
the compiler.

Along `fsdp` a block's parameters and gradients, and the embedding's rows and theirs, cross the
network in the compute dtype (their sums over microbatches are float32); the output matrix's
gradient, and along `data` all gradients, cross it in float32.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from llama_jax.distributed.mesh import RULES, automatic, batch_parts, by_hand, partition_spec, specs

Tree = TypeVar("Tree")

ROW_AXES = ("data", "fsdp")


def sums_over_rows(function: Callable[[Any, Tree], Any], model: Any, batch: Tree) -> Any:
    """`function(model, batch)`, scalars that are sums over rows, each device doing its own rows."""
    return _over_rows(lambda *given: (function(*given), ()), model, batch, ())[0]


def gradients_over_rows(
    function: Callable[[Any, Tree], tuple[Any, Any]], model: Any, batch: Tree
) -> tuple[Any, Any]:
    """The same for `function(model, batch)` → (sums, gradients).

    Gradients are summed once over `data`, and come back lying as the parameters do.
    """
    return _over_rows(function, model, batch, model)


def _over_rows(
    function: Callable[[Any, Tree], tuple[Any, Any]], model: Any, batch: Tree, gradients: Any
) -> tuple[Any, Any]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_parts(mesh) == 1:
        return function(model, batch)
    # An axis of one part is taken along: then nothing is left to the compiler's partitioner.
    axes = {*ROW_AXES} | {name for name, size in mesh.shape.items() if size == 1}

    def part(model: Any, batch: Tree) -> tuple[Any, Any]:
        sums, gradients = function(model, batch)
        return jax.lax.psum(sums, ROW_AXES), _summed(gradients)

    def along(axes_of: Any) -> Any:
        return jax.tree.map(lambda spec: _only(spec, axes), specs(axes_of, mesh))

    rows = PartitionSpec(RULES["batch"])
    return jax.shard_map(
        part,
        in_specs=(along(model), rows),
        out_specs=(PartitionSpec(), along(gradients)),
        axis_names=axes,
        check_vma=False,
    )(model, batch)


def _only(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    """What a spec says of some axes of the mesh."""
    return PartitionSpec(*(name if name in axes else None for name in spec))


def _summed(gradients: Tree) -> Tree:
    """Each device's gradients added up over the axes along which its parameter is copied."""
    sizes = by_hand()

    def of(leaf: nnx.Variable) -> nnx.Variable:
        cut = "fsdp" in [RULES[axis] for axis in leaf.axes]
        axes = tuple(name for name in ROW_AXES[: 1 if cut else 2] if sizes[name] > 1)
        return jax.tree.map(lambda part: jax.lax.psum(part, axes) if axes else part, leaf)

    return jax.tree.map(of, gradients, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def are_cut() -> bool:
    """Whether parameters are in parts that `whole` has to put together."""
    return by_hand().get("fsdp", 1) > 1


def whole(tree: Tree, dtype: Any) -> Tree:
    """A tree of parameters, each whole along `fsdp` and in `dtype`; uncut, just `tree`.

    Differentiated, it sums the gradient over the devices along `fsdp`, each keeping its part.
    """
    if not are_cut():
        return tree

    def of(leaf: nnx.Variable) -> nnx.Variable:
        return jax.tree.map(lambda part: _gathered(part.astype(dtype), leaf.axes), leaf)

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _gathered(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A parameter whose last dims lie along `axes`, put together from its parts along `fsdp`."""
    cut = [dim - len(axes) for dim, axis in enumerate(axes) if RULES[axis] == "fsdp"]
    if not cut:
        return part

    def gather(part: jax.Array) -> jax.Array:
        # Along the first dim, where parts follow each other in memory: along others the transpose,
        # a reduce-scatter, becomes an all-reduce on TPU, which sends twice as much.
        parts = jax.lax.all_gather(jnp.moveaxis(part, cut[0], 0), "fsdp", axis=0, tiled=True)
        return jnp.moveaxis(parts, 0, cut[0])

    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, part.shape, mesh)
    if all(name is None for name in spec):
        return gather(part)
    # Each part of the tensor axis by itself: else the compiler makes the parameter whole there too.
    return jax.shard_map(
        gather, in_specs=spec, out_specs=spec, axis_names=set(automatic(mesh)), check_vma=False
    )(part)


def lookup(table_VD: jax.Array, ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """The rows [B, T, D] of a table for some ids, in `dtype`.

    A table that is cut stays where it is. Along `fsdp`, each device looks up its part of the rows
    for the ids of all devices, and they exchange those; along `tensor`, it looks up the ids that
    are in its part of the vocabulary, and they add up what they found.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = automatic(mesh).get("tensor", 1)
    is_alone = all(size == 1 for name, size in automatic(mesh).items() if name != "tensor")
    if parts == 1 or not is_alone or table_VD.shape[0] % parts:
        return _lookup(table_VD, ids_BT, dtype)

    def add_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        V = table_VD.shape[0]
        ids_BT = ids_BT - jax.lax.axis_index("tensor") * V
        is_here_BT1 = ((ids_BT >= 0) & (ids_BT < V))[..., None]
        found_BTD = _lookup(table_VD, jnp.clip(ids_BT, 0, V - 1), dtype)
        return jax.lax.psum(jnp.where(is_here_BT1, found_BTD, 0), "tensor")

    return jax.shard_map(
        add_up,
        in_specs=(PartitionSpec("tensor"), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names=set(automatic(mesh)),
        check_vma=False,
    )(table_VD, ids_BT)


def _lookup(table_VD: jax.Array, ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """The same of a table that is at most cut along `fsdp`."""
    if not are_cut():
        return table_VD[ids_BT].astype(dtype)
    everyones_BT = jax.lax.all_gather(ids_BT, "fsdp", axis=0, tiled=True)
    parts_BTD = table_VD[everyones_BT].astype(dtype)
    return jax.lax.all_to_all(parts_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)


def row_numbers(rows: int) -> jax.Array:
    """Which rows of the whole batch those are that this device sees; int32 [rows]."""
    first = jnp.int32(0)
    for name in ROW_AXES:
        if name in by_hand():
            first = first * by_hand()[name] + jax.lax.axis_index(name)
    return first * rows + jnp.arange(rows, dtype=jnp.int32)
