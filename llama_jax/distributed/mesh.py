"""The device mesh, and sharding: one table from logical axes of tensors to axes of the mesh.

Mesh axes are always `data`, `fsdp` and `tensor`, of size 1 when unused. The model names logical
axes only; this file is the one place that knows what they mean on devices.

XLA partitions arrays along an automatic axis by itself. Along a manual axis, inside a
`jax.shard_map` over it, a program sees its own shard of each array, and every rule here ignores the
axis.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import Config, MeshConfig
from llama_jax.errors import UsageError, whole_number

Tree = TypeVar("Tree")
Rules = dict[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "tensor")

# The mesh axes that each logical axis of a parameter or an activation is sharded over.
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
    "rank": None,  # of an adapter
}
SEQUENCE_RULES: Rules = RULES | {"length": "tensor"}  # with mesh.sequence


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
            f"{_named(sizes)} do not multiply to {devices} devices; the nearest sizes that do are"
            f" {_named(_nearest_shape(sizes, devices))}",
            page="pods.md",
        )
    return shape


def _nearest_shape(sizes: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The sizes for so many devices that change the fewest of the requested ones, and by least."""

    def distance(shape: tuple[int, ...]) -> tuple[int, float]:
        factors = [new / old for new, old in zip(shape, sizes) if old not in (new, -1)]
        return len(factors), sum(abs(math.log(factor)) for factor in factors)

    parts = [part for part in range(devices, 0, -1) if devices % part == 0]  # data before tensor
    pairs = [pair for pair in itertools.product(parts, parts) if devices % math.prod(pair) == 0]
    return min(((*pair, devices // math.prod(pair)) for pair in pairs), key=distance)


def _named(sizes: tuple[int, ...]) -> str:
    return ", ".join(f"mesh.{name}={size}" for name, size in zip(MESH_AXES, sizes))


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config, over all devices or those passed.

    Raises:
      UsageError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def tensor_mesh(tensor: int) -> Mesh | None:
    """Return a mesh of the first devices that matrices are sharded over; None for one device.

    Raises:
      UsageError: when there are not so many.
    """
    devices = jax.device_count()
    whole_number("tensor", tensor, lambda n: 1 <= n <= devices, f"1 to {devices}, the devices")
    if tensor == 1:
        return None
    return make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])


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


def automatic(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The mesh axes, with sizes, along which XLA partitions arrays by itself."""
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    return {name: size for name, size in mesh.shape.items() if types[name] != AxisType.Manual}


def manual() -> dict[str, int]:
    """The manual axes, with sizes, of the program being traced: it sees one shard along them."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in automatic(mesh)}


def partition_spec(
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
) -> PartitionSpec:
    """The spec of an array whose last dims have the logical `axes`; leading dims are replicated.

    A dim that its mesh axes do not divide is replicated too, such as 8 kv heads on 16 devices.
    """
    axes = ("",) * (len(shape) - len(axes)) + axes
    sizes, entries = automatic(mesh), []
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
    """`jax.ShapeDtypeStruct`s with a sharding each."""

    def described(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(described, shapes, places)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many shards the batch has."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *axes: str, rules: Rules = RULES) -> jax.Array:
    """`x` with its sharding constrained to its logical `axes` on the mesh that is set, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(automatic(mesh).values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh, rules))


def constrain_sequence(x: jax.Array, *axes: str) -> jax.Array:
    """`constrain` for `mesh.sequence`: between blocks, positions are sharded over `tensor`."""
    return constrain(x, *axes, rules=SEQUENCE_RULES)


Item = TypeVar("Item")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """`jax.set_mesh`, or nothing where there is no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def iterate_on_mesh(mesh: Mesh, items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items of a generator, each of whose steps runs with the mesh set.

    A mesh is set for a thread: set for the generator's whole life, it would also be set for the
    code that consumes the items.
    """
    try:
        while True:
            with jax.set_mesh(mesh):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        with jax.set_mesh(mesh):
            items.close()  # type: ignore[attr-defined]


@functools.cache  # one function a kernel: a new one would be traced again
def shard_heads(kernel: Callable[..., Tree]) -> Callable[..., Tree]:
    """An attention kernel of which each device computes its own sequences and heads.

    For kernels that XLA cannot partition by itself: a loop, a custom call. The result takes
    queries, keys and values [B, T, heads, H], perhaps the documents of positions [B, T], and the
    kernel's options by keyword, of which `slopes_N` is sharded by heads. Heads that the tensor axis
    does not divide are repeated where that helps (8 kv heads on 16 devices: each serves half a
    group of queries), else every device computes all of them.
    """

    def sharded(
        *arrays: jax.Array | None, slopes_N: jax.Array | None = None, **options: Any
    ) -> Any:
        present = tuple(x for x in arrays if x is not None)
        compute = functools.partial(kernel, **options) if options else kernel
        if slopes_N is not None:
            present += (slopes_N,)
            plain = compute
            compute = lambda *arrays: plain(*arrays[:-1], slopes_N=arrays[-1])  # noqa: E731
        mesh = jax.sharding.get_abstract_mesh()
        sizes = automatic(mesh)
        if mesh.empty or math.prod(sizes.values()) == 1:
            return compute(*present)
        shards, most = mesh.shape["tensor"], max(x.shape[2] for x in present if x.ndim == 4)
        repeated = tuple(_repeated_heads(x, shards, most) if x.ndim == 4 else x for x in present)
        divides = all(x.shape[2] % shards == 0 for x in repeated if x.ndim == 4)
        batch = partition_spec(("batch",), present[0].shape[:1], mesh)[0]
        spec = PartitionSpec(batch, None, "tensor" if divides else None, None)
        spec_of = {4: spec, 2: PartitionSpec(batch, None), 1: PartitionSpec(spec[2])}
        return jax.shard_map(
            compute,
            in_specs=tuple(spec_of[x.ndim] for x in present),
            out_specs=spec,
            axis_names=set(sizes),
            check_vma=False,
        )(*(repeated if divides else present))

    return sharded


def _repeated_heads(x_BTNH: jax.Array, shards: int, most: int) -> jax.Array:
    """`x` with each head as often as `head_copies` says."""
    times = head_copies(x_BTNH.shape[2], shards, most)
    return x_BTNH if times == 1 else jnp.repeat(x_BTNH, times, axis=2)


def head_copies(heads: int, shards: int, most: int) -> int:
    """How often to repeat each head, so that `shards` divides them and they divide `most` queries.

    1 where no number does: then each device has all heads.
    """
    times = shards // math.gcd(heads, shards)
    return 1 if most % (heads * times) else times


def shard_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
    """`Execution.shard_attention`: each device computes and writes its own kv heads.

    XLA left to itself copies a batch's cache for every token on a TPU, and sends it around where
    the tensor axis does not divide the kv heads. Those are repeated, also in the cache. Where that
    does not help either, XLA is left to itself.
    """

    def sharded(q_BTNH, k_BTKH, v_BTKH, layer, key=None, slopes_N=None):  # type: ignore[no-untyped-def]
        sizes = automatic(jax.sharding.get_abstract_mesh())
        shards, N = sizes.get("tensor", 1), q_BTNH.shape[2]
        k_BTKH, v_BTKH = (_repeated_heads(x_BTKH, shards, N) for x_BTKH in (k_BTKH, v_BTKH))
        if math.prod(sizes.values()) == 1 or k_BTKH.shape[2] % shards:
            return attention(q_BTNH, k_BTKH, v_BTKH, layer, key, slopes_N)
        by_heads, heads_first = PartitionSpec(None, None, "tensor"), PartitionSpec("tensor")
        return jax.shard_map(
            lambda q, k, v, layer, slopes_N: attention(q, k, v, layer, None, slopes_N),
            in_specs=(by_heads, by_heads, by_heads, heads_first, heads_first),
            out_specs=(by_heads, heads_first),
            axis_names=set(sizes),
            check_vma=False,
        )(q_BTNH, k_BTKH, v_BTKH, layer, slopes_N)

    return sharded
