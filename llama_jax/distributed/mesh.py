"""Where arrays lie: one table from the logical axes of tensors to the axes of the device mesh.

Mesh axes are always `data`, `fsdp` and `tensor`, of size 1 when unused. The model names logical
axes only; this file is the one place that knows what they mean on devices.

The compiler cuts arrays along an axis by itself, unless a `jax.shard_map` has taken the axis over:
then a program sees its own part of each array, and the axis is gone from every rule here.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import MeshConfig
from llama_jax.errors import UsageError

Tree = TypeVar("Tree")
Rules = dict[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "tensor")

# What each logical axis of a parameter or an activation is cut along.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": None,  # positions of a sequence, between blocks
    "residual": None,  # activations' width; parameters call it `embed`
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}
SEQUENCE_RULES: Rules = RULES | {"length": "tensor"}  # with mesh.sequence

_rules = contextvars.ContextVar("rules", default=RULES)


@contextlib.contextmanager
def rules_of(config: MeshConfig) -> Iterator[None]:
    """Within it, arrays are placed as `config` wants; outside, as without `mesh.sequence`."""
    token = _rules.set(SEQUENCE_RULES if config.sequence else RULES)
    try:
        yield
    finally:
        _rules.reset(token)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """The sizes of `MESH_AXES` for so many devices.

    Raises:
      UsageError: when they do not multiply to the number of devices.
    """
    sizes = (config.data, config.fsdp, config.tensor)
    fixed = math.prod(size for size in sizes if size != -1)
    shape = tuple(devices // fixed if size == -1 else size for size in sizes)
    if math.prod(shape) != devices:
        raise UsageError(
            f"{_named(sizes)} do not arrange {devices} devices; the nearest sizes that do are"
            f" {_named(_nearest_shape(sizes, devices))}"
        )
    return shape


def _nearest_shape(sizes: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The sizes for so many devices that change the fewest of those asked for, and by least."""

    def distance(shape: tuple[int, ...]) -> tuple[int, float]:
        factors = [new / old for new, old in zip(shape, sizes) if old not in (new, -1)]
        return len(factors), sum(abs(math.log(factor)) for factor in factors)

    parts = [part for part in range(devices, 0, -1) if devices % part == 0]  # data before tensor
    pairs = [pair for pair in itertools.product(parts, parts) if devices % math.prod(pair) == 0]
    return min(((*pair, devices // math.prod(pair)) for pair in pairs), key=distance)


def _named(sizes: tuple[int, ...]) -> str:
    return ", ".join(f"mesh.{name}={size}" for name, size in zip(MESH_AXES, sizes))


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that a config asks for, over all devices or those given.

    Raises:
      UsageError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def automatic(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The axes, with their sizes, that arrays are cut along by the compiler."""
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    return {name: size for name, size in mesh.shape.items() if types[name] != AxisType.Manual}


def by_hand() -> dict[str, int]:
    """The axes, with their sizes, of which the program being traced sees one part."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in automatic(mesh)}


def partition_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The spec of an array whose last dims lie along `axes`; leading ones (layers) are whole.

    A dim that its mesh axes do not divide is left whole: 8 kv heads on 16 devices are copied.
    """
    axes = ("",) * (len(shape) - len(axes)) + axes
    sizes, rules, entries = automatic(mesh), _rules.get(), []
    for axis, size in zip(axes, shape):
        target = rules[axis] if axis else None
        named = (target,) if isinstance(target, str) else target or ()
        names = tuple(name for name in named if name in sizes)
        divides = size % math.prod(sizes[name] for name in names) == 0
        entries.append((names[0] if len(names) == 1 else names) if names and divides else None)
    return PartitionSpec(*entries)


def shardings(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """The sharding of each leaf of a tree of parameters or of optimizer state."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def specs(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """The spec of each leaf of a tree of parameters or of optimizer state.

    A leaf inside an `nnx.Param` follows the axes described there; any other leaf is replicated.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return PartitionSpec()
        return jax.tree.map(lambda array: partition_spec(leaf.axes, array.shape, mesh), leaf)

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first dim is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def placed(shapes: Tree, places: Any) -> Tree:
    """Descriptions of arrays, `jax.ShapeDtypeStruct`, that also say where each of them lies."""

    def described(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(described, shapes, places)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """`x`, told to lie along `axes` on the mesh that is set; without a mesh, just `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(automatic(mesh).values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


# Iterators each of whose steps runs on a mesh, while their users keep their own.
#
# A mesh is set for a thread; a generator that set it for its whole life would set it for whoever
# asks for its next item too.

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, arrays may be cut over the mesh; without one, nothing changes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def steps_on_mesh(
    method: Callable[Arguments, Iterator[Item]],
) -> Callable[Arguments, Iterator[Item]]:
    """A generator method of an object with a `mesh`, run step by step with that mesh set."""

    @functools.wraps(method)
    def stepped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Iterator[Item]:
        mesh = arguments[0].mesh  # type: ignore[attr-defined]
        steps = method(*arguments, **options)
        try:
            while True:
                with on_mesh(mesh):
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item
        finally:
            with on_mesh(mesh):
                steps.close()  # type: ignore[attr-defined]

    return stepped


# Attention on a mesh: each device does its own rows and heads.
#
# For attention that the compiler cannot cut by itself: a loop or a kernel. Does not know which.


def shard_heads(attention: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`attention` of [B, T, heads, H] arrays, each device doing its own rows and heads.

    Arrays [B, T], the numbers of documents, may follow. Heads that the tensor axis does not divide
    are repeated where that helps (8 kv heads on 16 devices: each does the queries of half a group),
    else left whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = automatic(mesh)
    if mesh.empty or math.prod(sizes.values()) == 1:
        return attention(*arrays)
    parts, most = mesh.shape["tensor"], max(x.shape[2] for x in arrays if x.ndim == 4)
    repeated = tuple(_repeated_heads(x, parts, most) if x.ndim == 4 else x for x in arrays)
    divides = all(x.shape[2] % parts == 0 for x in repeated if x.ndim == 4)
    batch = partition_spec(("batch",), arrays[0].shape[:1], mesh)[0]
    spec = PartitionSpec(batch, None, "tensor" if divides else None, None)
    rows = PartitionSpec(batch, None)
    in_specs = tuple(spec if x.ndim == 4 else rows for x in arrays)
    given = repeated if divides else arrays
    return jax.shard_map(
        attention, in_specs=in_specs, out_specs=spec, axis_names=set(sizes), check_vma=False
    )(*given)


def _repeated_heads(x_BTNH: jax.Array, parts: int, most: int) -> jax.Array:
    """`x` with each head as often as it takes for `parts` to divide them, if `most` allows it."""
    heads = x_BTNH.shape[2]
    times = parts // math.gcd(heads, parts)
    return x_BTNH if most % (heads * times) else jnp.repeat(x_BTNH, times, axis=2)
