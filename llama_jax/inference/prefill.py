"""Reading prompts into a cache, a stretch at a time, so that long prompts fit and lengths repeat.

Stretches come in few lengths, so that prompts of strange lengths do not compile again. It does not
choose tokens.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.distributed.fsdp import lookup
from llama_jax.distributed.mesh import constrain, shard_heads
from llama_jax.kernels.attention import KERNELS, choose_kernel
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.transformer import Llama

LONGEST_STRETCH = 512  # tokens of each row read at once; bounds the memory of a long prompt
SHORTEST_STRETCH = 16

# How programs with a cache run, on one device or on a mesh with a tensor axis.
WITH_CACHE = Execution(constrain=constrain, lookup=lookup)


def whole_sequence_execution(model: Llama) -> Execution:
    """How a pass over whole sequences runs, without a cache: by this device's fastest kernel."""
    config = model.config
    kernel = choose_kernel(
        "auto", jax.local_devices()[0], head_dim=config.head_size, dtype=config.compute_dtype
    )
    attention = KERNELS[kernel] if kernel == "xla" else shard_heads(KERNELS[kernel])
    return dataclasses.replace(WITH_CACHE, attention=attention)


def stretches(length: int, longest: int = LONGEST_STRETCH) -> list[int]:
    """The lengths in which `length` tokens are read; only the last is padded, to a power of two."""
    whole, rest = divmod(length, longest)
    if not rest:
        return [longest] * whole
    last = SHORTEST_STRETCH
    while last < rest:
        last *= 2
    return [longest] * whole + [min(last, longest)]


def padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Rows of ids, int32 [B, width], with zeros after those that are shorter."""
    padded_BT = np.zeros((len(rows), width), np.int32)
    for padded_T, ids in zip(padded_BT, rows):
        padded_T[: len(ids)] = ids
    return padded_BT


def slots_for(tokens: int) -> int:
    """Slots of a cache that holds so many tokens: few sizes, two an octave, from 64 on."""
    size = 64
    while size < tokens:
        size *= 2
    between = size // 4 * 3
    return between if 64 < between >= tokens else size


def read_prompts(
    model: Llama, cache: KVCache, prompts: Sequence[Sequence[int]], start: int = 0
) -> tuple[KVCache, jax.Array]:
    """The cache with the prompts in it, and the float32 logits [B, V] of the token after each.

    What padding wrote lies beyond a row's length: masked, then overwritten. The cache is donated.

    Args:
      prompts: whole, at least one id each and at most as many as there are slots.
      start: ids of every prompt that the cache holds already; fewer than any prompt has.
    """
    length_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
    rest = stretches(int(np.max(length_B)) - start)
    tokens_BT = padded([prompt[start:] for prompt in prompts], sum(rest))
    last_BD = jnp.zeros((len(prompts), model.config.dim), model.config.compute_dtype)
    at = 0
    for size in rest:
        ids_BC = tokens_BT[:, at : at + size]
        cache, last_BD = _read(model, cache, ids_BC, last_BD, np.int32(start + at), length_B)
        at += size
    return dataclasses.replace(cache, length_B=jnp.asarray(length_B)), _logits(model, last_BD)


@partial(jax.jit, donate_argnames="cache")
def _read(
    model: Llama,
    cache: KVCache,
    ids_BC: jax.Array,
    last_BD: jax.Array,
    start: jax.Array,
    length_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """One stretch, which begins at slot `start`; hidden states of last tokens that lie in it."""
    C = ids_BC.shape[1]
    here = dataclasses.replace(cache, length_B=jnp.full(length_B.shape, start, jnp.int32))
    hidden_BCD, filled = model.hidden(ids_BC, here, execution=WITH_CACHE)
    assert filled is not None
    at_B = length_B - 1 - start
    found_B1D = jnp.take_along_axis(hidden_BCD, jnp.clip(at_B, 0, C - 1)[:, None, None], axis=1)
    is_here_B = (at_B >= 0) & (at_B < C)
    return filled, jnp.where(is_here_B[:, None], found_B1D[:, 0], last_BD)


@jax.jit
def _logits(model: Llama, last_BD: jax.Array) -> jax.Array:
    return model.logits(last_BD[:, None])[:, 0]
