"""What a block's forward pass keeps for its backward pass, by name: memory against arithmetic.

- `none`: everything.
- `block`: only the block's input; the rest is computed again.
- `save-qkv`: the input, and queries, keys and values; attention and feed-forward again.
- `offload`: as `save-qkv`, but queries, keys and values wait in the host's memory. A CPU's memory
  is the host's, so there it is `save-qkv`.

Does not know the model: what a policy means by name, the model names.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.distributed.fsdp import are_cut
from llama_jax.errors import UsageError

QKV = ("queries", "keys", "values")
HOST = "pinned_host"  # the memory of the host that a device reads and writes by itself


def named(name: str, x: jax.Array) -> jax.Array:
    """`x`, which a policy can mean by name."""
    return checkpoint_name(x, name)


def require_possible(policy: str) -> None:
    """What a policy takes must be here.

    Raises:
      UsageError: for "offload", when this process's devices do not reach the host's memory.
    """
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if policy == "offload" and HOST not in kinds:
        raise UsageError(
            f"run.remat='offload' needs memory of kind {HOST} and {device.device_kind} has only"
            f" {', '.join(kinds)}; use run.remat='save-qkv', or 'block' for the least memory"
        )


def rematerialised(step: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`step`, the body of a scan, with what its backward pass needs kept or computed again."""
    if policy == "none":
        return jax.checkpoint(step, policy=_all_but_parameters) if are_cut() else step
    # A scan keeps its turns apart by itself; barriers against common subexpressions only cost.
    return jax.checkpoint(step, policy=_what_to_save(policy), prevent_cse=False)


def _what_to_save(policy: str) -> Callable[..., Any] | None:
    policies = jax.checkpoint_policies
    if policy == "block":
        return None
    if policy == "save-qkv":
        return policies.save_only_these_names(*QKV)
    assert policy == "offload", policy
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(QKV),
        offload_src="device",
        offload_dst=HOST,
    )


def _all_but_parameters(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep everything but what is only a gathered parameter in another shape: those are too big."""
    return primitive.name not in ("all_gather", "convert_element_type", "reshape", "transpose")
