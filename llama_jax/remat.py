"""What a block's forward pass keeps for its backward pass, by name: memory against arithmetic.

- `none`: everything.
- `block`: only the block's input; the rest is computed again.
- `save-qkv`: the input, and queries, keys and values; attention and feed-forward again.
- `offload`: as `save-qkv`, but in the host's memory.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

QKV = ("queries", "keys", "values")


def named(name: str, x: jax.Array) -> jax.Array:
    """`x`, which a policy can mean by name."""
    return checkpoint_name(x, name)


def rematerialised(step: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`step` with what its backward pass needs kept, offloaded or computed again."""
    policies = jax.checkpoint_policies
    if policy == "none":
        return step
    if policy == "block":
        return jax.checkpoint(step)
    if policy == "save-qkv":
        return jax.checkpoint(step, policy=policies.save_only_these_names(*QKV))
    assert policy == "offload", policy
    to_host = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(QKV),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(step, policy=to_host)
