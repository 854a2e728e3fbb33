"""Prefill and decode: the jitted programs that read prompts into a cache and add tokens to them.

All that changes is in `GenerationState`, which is donated: the cache is never copied.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import ModelConfig
from llama_jax.distributed.fsdp import lookup
from llama_jax.distributed.mesh import (
    constrain,
    head_copies,
    partition_spec,
    shard_attention,
    shard_heads,
)
from llama_jax.inference.request import TokenLogprob
from llama_jax.inference.sampler import Sampler, TokenCounts
from llama_jax.kernels.attention import KERNELS, AttentionKernel
from llama_jax.kernels.matmul import platform
from llama_jax.kernels.splash import splash_with_log_sums
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.slot_cache import BLOCK, OneSlot, SlotCache
from llama_jax.model.transformer import ONE_DEVICE, Llama

DECODE_CHUNK = BLOCK  # tokens per call of `decode`, after which the host sees them
NO_TOKEN = -1  # in place of a token, after the end of a sequence
MAX_PREFILL_CHUNK = 512  # tokens of each prompt read at once; bounds the memory of a long prompt
MIN_PREFILL_CHUNK = 16

# How programs run on a mesh, without gradients; a cache brings its own attention.
ON_MESH = Execution(constrain=constrain, lookup=lookup, shard_attention=shard_attention)
# On TPUs, one or a mesh of them.
ON_TPU = dataclasses.replace(ON_MESH, among_new=shard_heads(splash_with_log_sums))


def decoding_execution() -> Execution:
    """Return how a model with a cache runs on the mesh that is set, or on one device."""
    if platform() == "tpu":
        return ON_TPU
    return ONE_DEVICE if jax.sharding.get_abstract_mesh().empty else ON_MESH


def attention_on_mesh(name: str) -> AttentionKernel:
    """Return the attention kernel of a name, for whole sequences on a mesh or one device.

    XLA partitions its own; of the others each device runs its shard of sequences and heads.
    """
    return KERNELS[name] if name == "xla" else shard_heads(KERNELS[name])


CacheT = TypeVar("CacheT", KVCache, SlotCache, OneSlot)


def cache_config(config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> ModelConfig:
    """Return the config of a model's cache, which holds copies of kv heads if devices share them.

    See `distributed.mesh.shard_attention`.
    """
    if mesh is None:
        return config
    copies = head_copies(config.num_kv_heads, mesh.shape["tensor"], config.num_heads)
    return dataclasses.replace(config, num_kv_heads=copies * config.num_kv_heads)


def cache_shardings(cache: CacheT, mesh: Mesh | AbstractMesh) -> CacheT:
    """Return the sharding of each array of a cache, or of its shape: layers by kv heads."""

    def by_heads(array: jax.Array) -> NamedSharding:  # kv heads, perhaps times sequences, are first
        axes = ("kv_heads", *[""] * (array.ndim - 1))
        return NamedSharding(mesh, partition_spec(axes, array.shape, mesh))

    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), cache)
    return dataclasses.replace(places, layers=jax.tree.map(by_heads, cache.layers))


def empty_cache(
    config: ModelConfig, batch: int, slots: int, dtype: str, mesh: Mesh | None
) -> KVCache:
    """Return `KVCache.empty`; of a mesh, each device makes its own shard."""
    make = partial(KVCache.empty, cache_config(config, mesh), batch, slots, dtype)
    if mesh is None:
        return make()
    shapes = jax.eval_shape(make)
    places = cache_shardings(shapes, mesh)
    return jax.tree.map(lambda x, at: jnp.zeros(x.shape, x.dtype, device=at), shapes, places)


# --- prefill ---


def prefill_chunks(length: int, longest: int = MAX_PREFILL_CHUNK) -> list[int]:
    """Return the chunk lengths in which `length` tokens are read.

    Only the last chunk is padded, to a power of two, so that few lengths are compiled.
    """
    full, rest = divmod(length, longest)
    if not rest:
        return [longest] * full
    last = MIN_PREFILL_CHUNK
    while last < rest:
        last *= 2
    return [longest] * full + [min(last, longest)]


def common_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens of a prompt are cached; its last is read again, for its logits."""
    most = min(len(cached), len(prompt) - 1)
    return next((i for i in range(most) if cached[i] != prompt[i]), most)


def pad_sequences(sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return the ids of sequences, int32 [B, width], with zeros after the shorter ones."""
    padded_BT = np.zeros((len(sequences), width), np.int32)
    for padded_T, ids in zip(padded_BT, sequences):
        padded_T[: len(ids)] = ids
    return padded_BT


def cache_slots(tokens: int) -> int:
    """Return the slots of a cache for so many tokens: few sizes, two per octave, from 64 on."""
    size = 64
    while size < tokens:
        size *= 2
    between = size // 4 * 3
    return between if 64 < between >= tokens else size


def prefill(
    model: Llama,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    start: int = 0,
    longest: int = MAX_PREFILL_CHUNK,
    execution: Execution = ONE_DEVICE,
) -> tuple[KVCache, jax.Array]:
    """Return the cache filled with the prompts, and the float32 logits [B, V] after each.

    What padding writes lies beyond a sequence's length: masked, then overwritten. The cache is
    donated.

    Args:
      prompts: from their first token on; at least one id each, and at most as many as slots.
      start: tokens of every prompt that the cache holds already; fewer than any prompt has.
      longest: tokens of each prompt read at once.
    """
    length_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
    chunks = prefill_chunks(int(np.max(length_B)) - start, longest)
    tokens_BT = pad_sequences([prompt[start:] for prompt in prompts], sum(chunks))
    last_BD = jnp.zeros((len(prompts), model.config.dim), model.config.compute_dtype)
    at = 0
    for size in chunks:
        ids_BC = tokens_BT[:, at : at + size]
        cache, last_BD = read_chunk(
            model, cache, ids_BC, last_BD, np.int32(start + at), length_B, execution
        )
        at += size
    return dataclasses.replace(cache, length_B=jnp.asarray(length_B)), _logits(model, last_BD)


@partial(jax.jit, donate_argnames="cache", static_argnames="execution")
def read_chunk(
    model: Llama,
    cache: KVCache,
    ids_BC: jax.Array,
    last_BD: jax.Array,
    start: jax.Array,
    length_B: jax.Array,
    execution: Execution = ONE_DEVICE,
) -> tuple[KVCache, jax.Array]:
    """Read the chunk at slot `start`; return the hidden states of last tokens found so far."""
    C = ids_BC.shape[1]
    # Every sequence is at the same slot: one place to write, where others would need a scatter.
    here = dataclasses.replace(cache, length_B=start)
    hidden_BCD, filled = model.hidden(ids_BC, here, execution=execution)
    assert filled is not None
    filled = dataclasses.replace(filled, length_B=jnp.full_like(length_B, start + C))
    at_B = length_B - 1 - start
    found_B1D = jnp.take_along_axis(hidden_BCD, jnp.clip(at_B, 0, C - 1)[:, None, None], axis=1)
    is_here_B = (at_B >= 0) & (at_B < C)
    return filled, jnp.where(is_here_B[:, None], found_B1D[:, 0], last_BD)


@jax.jit
def _logits(model: Llama, last_BD: jax.Array) -> jax.Array:
    return model.logits(last_BD[:, None])[:, 0]


# --- decode ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerationState(Generic[CacheT]):
    """The state of a batch of sequences being generated."""

    cache: CacheT
    token_B: jax.Array  # the last token, not in the cache yet
    stopped_B: jax.Array  # sequences that have met a stop token
    limit_B: jax.Array  # tokens, prompt included, at which a sequence ends
    keys_B: jax.Array
    counts: TokenCounts | None  # if the sampler needs them

    @property
    def done_B(self) -> jax.Array:
        """Sequences that have met a stop token or their limit."""
        return are_done(self.stopped_B, self.cache.length_B, self.limit_B)


def state_shardings(
    state: GenerationState[CacheT], mesh: Mesh | AbstractMesh
) -> GenerationState[CacheT]:
    """Return the sharding of each array of a state, or of its shape; only the cache has shards."""
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    return dataclasses.replace(places, cache=cache_shardings(state.cache, mesh))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopLogprobs:
    """Natural logarithms, float32, of given tokens and of the n most likely ones, falling."""

    token: jax.Array  # [...]
    top_ids: jax.Array  # [..., n] int32; of equally likely tokens the lower id comes first
    top: jax.Array  # [..., n]


class Tokens(NamedTuple):
    """New tokens of each sequence, `NO_TOKEN` where there is none."""

    token: jax.Array  # [B] or [B, C], int32
    logprobs: TopLogprobs | None = None  # if requested

    def ids(self) -> list[list[int]]:
        """Wait for the device; return the new ids of each sequence."""
        ids_BC = np.asarray(self.token).reshape(len(self.token), -1)
        return [[token for token in ids if token != NO_TOKEN] for ids in ids_BC.tolist()]

    def reported(self, index: int, top: int | None = None) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities of the new ids of a sequence; () if none were requested.

        Args:
          top: how many of the most likely tokens beside each; None: all that there are.
        """
        if self.logprobs is None:
            return ()
        arrays = (self.token, self.logprobs.token, self.logprobs.top_ids, self.logprobs.top)
        ids, own, top_ids, tops = (np.asarray(array)[index] for array in arrays)
        ids_C, own_C = np.atleast_1d(ids), np.atleast_1d(own)
        shape = (len(ids_C), -1)
        top_ids_CN, tops_CN = top_ids.reshape(shape)[:, :top], tops.reshape(shape)[:, :top]
        return tuple(
            TokenLogprob(
                int(ids_C[c]),
                float(own_C[c]),
                tuple(map(TokenLogprob, top_ids_CN[c].tolist(), tops_CN[c].tolist())),
            )
            for c in np.flatnonzero(ids_C != NO_TOKEN)
        )


Flags = TypeVar("Flags", jax.Array, np.ndarray)


def are_done(stopped_B: Flags, length_B: Flags, limit_B: Flags) -> Flags:
    """Return which sequences have met a stop token or, with the last token, their limit."""
    return stopped_B | (length_B + 1 >= limit_B)


@partial(jax.jit, donate_argnames="state", static_argnames="logprobs")
def sample_first_token(
    state: GenerationState[CacheT],
    logits_BV: jax.Array,
    sampler: Sampler,
    stops_S: jax.Array,
    logprobs: int | None = None,
) -> tuple[GenerationState[CacheT], Tokens]:
    """Return the state after each sequence's first token, chosen from the logits of prefill."""
    none_done_B = jnp.zeros(state.token_B.shape, bool)
    return _sample(state, none_done_B, logits_BV, sampler, stops_S, logprobs)


@partial(jax.jit, donate_argnames="state", static_argnames=("logprobs", "execution"))
def decode(
    model: Llama,
    state: GenerationState[KVCache],
    sampler: Sampler,
    stops_S: jax.Array,
    logprobs: int | None = None,
    execution: Execution = ONE_DEVICE,
) -> tuple[GenerationState[KVCache], Tokens]:
    """Return the state up to `DECODE_CHUNK` tokens later, and those tokens [B, C].

    Fewer tokens are made when all sequences are done earlier, and one if the sampler has a mask of
    allowed tokens, which holds for the next one only.

    Args:
      stops_S: ids that end a sequence; they are not returned.
      logprobs: how many top tokens to report beside each; None reports nothing.
    """
    steps = DECODE_CHUNK if sampler.allowed_BW is None else 1
    return decode_steps(model, state, sampler, stops_S, steps, logprobs, execution)


def decode_steps(
    model: Llama,
    state: GenerationState[CacheT],
    sampler: Sampler,
    stops: jax.Array,
    steps: int | jax.Array,
    logprobs: int | None,
    execution: Execution,
) -> tuple[GenerationState[CacheT], Tokens]:
    """As `decode`, for other programs: up to `steps` tokens, at most `DECODE_CHUNK`.

    Args:
      stops: ids that end a sequence, [S], or of each sequence [B, S].
    """

    def unfinished(carry: tuple[jax.Array, GenerationState[CacheT], Tokens]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1].done_B.all()

    def step(
        carry: tuple[jax.Array, GenerationState[CacheT], Tokens],
    ) -> tuple[jax.Array, GenerationState[CacheT], Tokens]:
        index, state, tokens = carry
        logits_B1V, cache = model(state.token_B[:, None], state.cache, execution=execution)
        assert cache is not None
        # A done sequence keeps its length: what it writes lies beyond it.
        done_B = state.done_B
        length_B = jnp.where(done_B, state.cache.length_B, cache.length_B)
        state = dataclasses.replace(state, cache=dataclasses.replace(cache, length_B=length_B))
        state, new = _sample(state, done_B, logits_B1V[:, 0], sampler, stops, logprobs)
        tokens = jax.tree.map(lambda all_BC, new_B: all_BC.at[:, index].set(new_B), tokens, new)
        return index + 1, state, tokens

    start = (jnp.int32(0), state, _no_tokens(state.token_B.shape[0], logprobs))
    _, state, tokens = jax.lax.while_loop(unfinished, step, start)
    return state, tokens


def _no_tokens(batch: int, logprobs: int | None) -> Tokens:
    shape = (batch, DECODE_CHUNK)
    token_BC = jnp.full(shape, NO_TOKEN, jnp.int32)
    if logprobs is None:
        return Tokens(token_BC)
    top = (*shape, logprobs)
    zeros_BC = jnp.zeros(shape, jnp.float32)
    return Tokens(token_BC, TopLogprobs(zeros_BC, jnp.zeros(top, jnp.int32), jnp.zeros(top)))


def _sample(
    state: GenerationState[CacheT],
    done_B: jax.Array,
    logits_BV: jax.Array,
    sampler: Sampler,
    stops: jax.Array,
    logprobs: int | None,
) -> tuple[GenerationState[CacheT], Tokens]:
    """Return the state with the next token of each sequence that is not done, and those tokens.

    `NO_TOKEN` stands where a sequence was done already, or ends here at a stop token.
    """
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.cache.length_B)
    token_B = sampler(logits_BV, keys_B, state.counts)
    stops_B = (token_B[:, None] == jnp.atleast_2d(stops)).any(axis=-1)
    stopped_B = state.stopped_B | (stops_B & ~done_B)
    counts = state.counts
    if counts and sampler.needs_counts:
        counts = counts.add(token_B, ~done_B)
    top = None if logprobs is None else top_logprobs(logits_BV, token_B, logprobs)
    new_B = jnp.where(done_B | stopped_B, NO_TOKEN, token_B)
    state = dataclasses.replace(state, token_B=token_B, stopped_B=stopped_B, counts=counts)
    return state, Tokens(new_B, top)


def top_logprobs(logits: jax.Array, tokens: jax.Array, n: int) -> TopLogprobs:
    """Return the log-probabilities of tokens [...] and of the n most likely under logits [..., V].

    They are the model's own, before bias, penalties, temperature and filters, as OpenAI's API
    reports them: comparable between settings, and their sum is a text's score.

    Args:
      n: 0 to V; must be static under `jit`.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    token = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(logprobs, n)
    return TopLogprobs(token, top_ids, top)


@partial(jax.jit, donate_argnames="cache", static_argnames="execution")
def decode_one(
    model: Llama, token: jax.Array, cache: KVCache, execution: Execution = ONE_DEVICE
) -> tuple[jax.Array, KVCache]:
    """Return the logits [V] after one more token of a single sequence, and the cache with it."""
    logits_11V, filled = model(token.reshape(1, 1), cache, execution=execution)
    assert filled is not None
    return logits_11V[0, 0], filled
