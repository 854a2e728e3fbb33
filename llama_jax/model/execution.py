"""How a forward pass is run, as one value that the model takes beside its inputs.

The model is mathematics; which attention kernel runs, what is kept for the backward pass, how
activations are sharded and when parameters are gathered comes in as `Execution`. A program makes
one and passes it down: `training.step` for training, `inference.engine` for generation.

Rematerialisation policies, from most memory to least:

- `none`: keep every intermediate.
- `save-matmuls`: keep each block's input, its queries, keys and values, the output of attention
  with the log of its denominators, and gate and up of the feed-forward; recompute the cheap rest,
  and of the matmuls attention's output projection alone.
- `save-qkv`: keep each block's input and its queries, keys and values; recompute the rest.
- `offload`: as `save-qkv`, with queries, keys and values in the host's memory. On CPU that is the
  device's memory, so there it equals `save-qkv`.
- `block`: keep only each block's input; recompute the rest.

`auto` is `save-matmuls` on accelerators, where writing the rest to memory takes longer than
computing it again, and `none` on CPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention import AttentionKernel, xla_attention
from llama_jax.kernels.blockwise import KEPT
from llama_jax.model.cache import AttentionFunction

QKV = ("queries", "keys", "values")  # names that `model.transformer` gives by `checkpoint_name`
MATMULS = (*QKV, KEPT, "gate", "up")
HOST_MEMORY = "pinned_host"  # the kind of host memory that a device reads and writes by itself


def unconstrained(x: jax.Array, *axes: str) -> jax.Array:
    """`x` itself: on one device there is nothing to shard."""
    return x


def take_floats(table_VD: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The rows [*ids, D] of a table, in `dtype`."""
    return table_VD[ids].astype(dtype)


def table_lookup(
    table: Any, ids: jax.Array, dtype: jnp.dtype, take: Callable[..., jax.Array] = take_floats
) -> jax.Array:
    """The rows [*ids, D] of an unsharded table, in `dtype`.

    Args:
      take: of (table, ids, dtype), for a table that is no array of floats.
    """
    return take(table, ids, dtype)


def unsharded_attention(attention: AttentionFunction) -> AttentionFunction:
    """`attention` itself: on one device there is nothing to shard."""
    return attention


def first_examples(count: int) -> jax.Array:
    """The index of each sequence in the whole batch, int32 [B], where one device has all of it."""
    return jnp.arange(count, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run `Llama.hidden`. The defaults are for one device.

    Hashable, so that it can be a static argument of `jax.jit`; made of functions that are created
    once, since a new closure would compile again.
    """

    attention: AttentionKernel = xla_attention  # within whole sequences; a cache has its own way
    drops_weights: bool = True  # whether dropout also acts on the weights of `attention`
    remat: str = "none"
    # New tokens' attention to each other where a cache has others before them: (q, k, v, *, window)
    # -> (the mixed values, the log of each softmax's denominator [B, T, N, 1]). The filled part of
    # the cache is then read in chunks. None: all slots are read at once.
    among_new: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    # Attention over a cache -> the same, of which each device computes and writes its own heads.
    shard_attention: Callable[[AttentionFunction], AttentionFunction] = unsharded_attention
    unroll: int = 1  # blocks per iteration of the scan over layers
    # (x, *logical axes) -> x with the sharding that those axes have on the mesh
    constrain: Callable[..., jax.Array] = unconstrained
    # (parameters, dtype) -> the same, all-gathered and cast; None where no parameter is sharded so
    gather: Callable[[Any, Any], Any] | None = None
    lookup: Callable[..., jax.Array] = table_lookup  # arguments as there
    # (sequences on this device) -> their indices in the whole batch; dropout is drawn by them
    example_ids: Callable[[int], jax.Array] = first_examples

    def gathered(self, parameters: Any, dtype: Any) -> Any:
        """The parameters as a block needs them."""
        return parameters if self.gather is None else self.gather(parameters, dtype)

    def rematerialized(self, step: Callable[..., Any], in_scan: bool) -> Callable[..., Any]:
        """`step`, which runs a block, with the policy `remat` applied.

        `in_scan`: whether it is the body of a scan over blocks.
        """
        if self.remat == "none":
            if self.gather is None:
                return step
            return jax.checkpoint(step, policy=_all_but_gathered_parameters)
        # A scan keeps its iterations apart anyway; barriers against merging them only cost.
        return jax.checkpoint(step, policy=_policy(self.remat), prevent_cse=not in_scan)


def choose_remat(name: str, platform: str) -> str:
    """The policy that `run.remat` names for devices of a platform, such as "tpu"."""
    if name != "auto":
        return name
    return "none" if platform == "cpu" else "save-matmuls"


def _policy(remat: str) -> Callable[..., Any] | None:
    """The `jax.checkpoint` policy of a name."""
    policies = jax.checkpoint_policies
    if remat == "block":
        return None
    if remat == "save-matmuls":
        return policies.save_from_both_policies(
            policies.save_only_these_names(*MATMULS), _cudnn_attention
        )
    if remat == "save-qkv":
        return policies.save_only_these_names(*QKV)
    assert remat == "offload", remat
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(QKV),
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )


def _cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep what cuDNN's attention returns for its backward pass, to which JAX gives no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


def _all_but_gathered_parameters(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep everything but gathered parameters and copies of them in another shape or dtype.

    One device has no room for all parameters; the backward pass gathers them again.
    """
    return primitive.name not in ("all_gather", "convert_element_type", "reshape", "transpose")
