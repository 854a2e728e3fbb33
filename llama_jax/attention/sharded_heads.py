"""Attention on a mesh: each device does its own rows and heads.

For attention that the compiler cannot cut by itself: a loop or a kernel. Does not know which.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.parallel.sharding import automatic, partition_spec


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
