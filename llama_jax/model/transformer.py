"""Llama 2 (Touvron et al. 2023): mathematics only. How it is run comes in as an `Execution`.

One model, two layouts of its blocks. For training and on disk they are one `Block` whose arrays
have a leading layer dim, run by `lax.scan`: constant compile time. For decoding they are a list of
blocks, made once by `unstack`, each layer with its own cache: the cache never goes through a scan.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelConfig
from llama_jax.errors import UsageError
from llama_jax.kernels.matmul import prefers_outputs_first
from llama_jax.model.cache import AttentionFunction, KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.layers import (
    Linear,
    OutputsFirstLinear,
    RMSNorm,
    dropout,
    embed,
    parameter,
    unembed,
)
from llama_jax.model.positions import Positions, positions_within
from llama_jax.model.slot_cache import OneSlot, SlotCache

ONE_DEVICE = Execution()

CacheT = TypeVar("CacheT", KVCache, SlotCache, OneSlot)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023): N query heads share K of keys and values."""

    def __init__(self, config: ModelConfig, *, std: float, residual_std: float, rngs: nnx.Rngs):
        D, N, K, H = config.dim, config.num_heads, config.num_kv_heads, config.head_size
        queries, keys = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        linear = partial(Linear, rngs=rngs, bias=config.attention_bias)
        self.wq = linear((D,), (N, H), queries, std=std)
        self.wk = linear((D,), (K, H), keys, std=std)
        self.wv = linear((D,), (K, H), keys, std=std)
        self.wo = linear((N, H), (D,), ("heads", "head_dim", "embed"), std=residual_std)
        if config.position == "relative":
            # How far scores fall over the context. Kept here, since a shorter or longer context
            # that the model is run with later does not change what was learned.
            self.slopes = nnx.Param(jnp.ones(N, jnp.float32), axes=("heads",), is_exact=True)
            self.slope_length = config.context_length

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        attention: AttentionFunction,
        cache: Any = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The output [B, T, D], and the cache with T more slots filled if one came in."""
        # The names are what rematerialisation policies keep; see `model.execution`.
        q_BTNH = checkpoint_name(positions.rotate(self.wq(x_BTD)), "queries")
        k_BTKH = checkpoint_name(positions.rotate(self.wk(x_BTD)), "keys")
        v_BTKH = checkpoint_name(self.wv(x_BTD), "values")
        learned_N = None
        if hasattr(self, "slopes"):
            learned_N = self.slopes[...].astype(jnp.float32) / self.slope_length
        slopes_N = positions.bias(learned_N)
        mixed_BTNH, cache = attention(q_BTNH, k_BTKH, v_BTKH, cache, dropout_key, slopes_N)
        return self.wo(mixed_BTNH), cache


def attend_within(
    segments_BT: jax.Array | None, rate: float, execution: Execution, window: int = 0
) -> AttentionFunction:
    """Attention among the tokens themselves, with a fraction `rate` of the weights dropped."""
    windowed = partial(execution.attention, window=window) if window else execution.attention

    def attention(q_BTNH, k_BTKH, v_BTKH, _cache, key, slopes_N):  # type: ignore[no-untyped-def]
        kernel = windowed if slopes_N is None else partial(windowed, slopes_N=slopes_N)
        arrays = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
        if key is None or not rate:
            return kernel(*arrays), None
        ids = execution.example_ids
        drop = partial(dropout, rate=rate, key=key, example_ids=ids, batch_dim=1)
        return kernel(*arrays, drop), None

    return attention


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, std: float, residual_std: float, rngs: nnx.Rngs):
        D, F = config.dim, config.ffn_dim
        linear = partial(Linear, rngs=rngs, bias=config.mlp_bias)
        self.gate = linear((D,), (F,), ("embed", "mlp"), std=std)
        self.up = linear((D,), (F,), ("embed", "mlp"), std=std)
        self.down = linear((F,), (D,), ("mlp", "embed"), std=residual_std)

    def __call__(self, x_BTD: jax.Array, execution: Execution) -> jax.Array:
        gate_BTF = checkpoint_name(self.gate(x_BTD), "gate")
        hidden_BTF = jax.nn.silu(gate_BTF) * checkpoint_name(self.up(x_BTD), "up")
        return self.down(execution.constrain(hidden_BTF, "batch", "", "mlp"))


class Block(nnx.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        # Each block adds to the residual stream twice; scaled so that its variance does not grow
        # with depth (Radford et al. 2019, section 2.3). llama2.c means the same, but scales `up`.
        residual_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(
            config, std=config.init_std, residual_std=residual_std, rngs=rngs
        )
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config, std=config.init_std, residual_std=residual_std, rngs=rngs)
        self.dropout_rate = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        attention: AttentionFunction,
        execution: Execution,
        cache: Any = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The residual stream [B, T, D] after this block, and the layer's updated cache."""
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        example_ids = execution.example_ids
        # Where positions are sharded, matmuls read whole sequences. Gathered here, once, gradients
        # by several matrices are added up before they are scattered, and not scattered one by one.
        whole = ("batch", "", "residual")
        normed_BTD = execution.constrain(self.attention_norm(x_BTD), *whole)
        mixed_BTD, cache = self.attention(normed_BTD, positions, attention, cache, keys[0])
        x_BTD += dropout(mixed_BTD, self.dropout_rate, keys[1], example_ids)
        x_BTD = execution.constrain(x_BTD, "batch", "length", "residual")
        ffn_BTD = self.ffn(execution.constrain(self.ffn_norm(x_BTD), *whole), execution)
        x_BTD += dropout(ffn_BTD, self.dropout_rate, keys[2], example_ids)
        return execution.constrain(x_BTD, "batch", "length", "residual"), cache


class Llama(nnx.Module):
    """The whole model: token ids in, logits out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = ((config.vocab_size, config.dim), ("vocab", "embed"), config.init_std, rngs)
        self.embedding = parameter(*table)
        self.blocks = jax.vmap(lambda layer_rngs: Block(config, rngs=layer_rngs))(
            rngs.split(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.output = parameter(*table)
        if config.position == "absolute":  # last: other positions have the same weights beside it
            shape, axes = (config.context_length, config.dim), ("length", "embed")
            self.position_embedding = parameter(shape, axes, config.init_std, rngs)

    @property
    def output_VD(self) -> jax.Array:
        """The matrix that maps hidden states to logits, as floats."""
        table = self.embedding if self.config.tied_embeddings else self.output
        if isinstance(table, nnx.Param):
            return table[...]
        return table.floats(jnp.dtype(self.config.compute_dtype))

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: CacheT | None = None,
        *,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        execution: Execution = ONE_DEVICE,
    ) -> tuple[jax.Array, CacheT | None]:
        """The normalised hidden states [B, T, D] before the output matrix, and the updated cache.

        Args:
          tokens_BT: int32 ids. With a cache they continue each sequence after its filled slots.
          cache: needs an unstacked model.
          segments_BT: int32, for sequences packed with several documents: the index of each
            position's document. No document attends to another, and positions start anew with each.
          dropout_key: dropout happens only when there is one.
          execution: how to run it.

        Raises:
          UsageError: without a cache, for more tokens than the table of "absolute" has positions.
        """
        config, T = self.config, tokens_BT.shape[1]
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
        if cache is not None:
            positions_BT = cache.positions(T)
            attention = execution.shard_attention(
                cache.attention(positions_BT, config.sliding_window, execution.among_new)
            )
        else:
            if segments_BT is not None:
                positions_BT = positions_within(segments_BT)
            window = config.sliding_window
            rate = config.dropout if execution.drops_weights else 0.0
            attention = attend_within(segments_BT, rate, execution, window)
        positions = Positions.of(config, positions_BT)
        embedding_key = layer_keys = None
        if dropout_key is not None:
            embedding_key, blocks_key = jax.random.split(dropout_key)
            layer_keys = jax.random.split(blocks_key, config.num_layers)

        dtype = jnp.dtype(config.compute_dtype)
        x_BTD = embed(self.embedding, tokens_BT, dtype, execution.lookup)
        x_BTD = positions.embed(x_BTD, self._position_table(T if cache is None else 0, execution))
        x_BTD = dropout(x_BTD, config.dropout, embedding_key, execution.example_ids)
        x_BTD = execution.constrain(x_BTD, "batch", "length", "residual")
        if isinstance(self.blocks, Block):
            assert cache is None, "a cache needs an unstacked model; see `unstack`"
            step, blocks = _step(positions, attention, execution, in_scan=True), self.blocks
            x_BTD, _ = jax.lax.scan(step, x_BTD, (blocks, layer_keys), unroll=execution.unroll)
        elif cache is None:
            step = _step(positions, attention, execution, in_scan=False)
            for index, block in enumerate(self.blocks):
                x_BTD, _ = step(x_BTD, (block, None if layer_keys is None else layer_keys[index]))
        else:
            layers = []

            @partial(jax.jit, inline=True)  # traced once for all blocks
            def run(block: Block, x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
                return block(x_BTD, positions, attention, execution, layer)

            for block, layer in zip(self.blocks, cache.layers):
                x_BTD, layer = run(block, x_BTD, layer)
                layers.append(layer)
            cache = cache.filled(tuple(layers), T)
        return execution.gathered(self.norm, x_BTD.dtype)(x_BTD), cache

    def _position_table(self, length: int, execution: Execution) -> jax.Array | None:
        """The learned positions [S, D], if the model has them, of which S is at least `length`."""
        if self.config.position != "absolute":
            return None
        table_SD = execution.gathered(self.position_embedding, self.config.compute_dtype)[...]
        if length > len(table_SD):
            raise UsageError(
                f"a sequence has {length} tokens and the table of model.position='absolute' has"
                f" {len(table_SD)} positions; shorten it"
            )
        return table_SD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states."""
        table = self.embedding if self.config.tied_embeddings else self.output
        logits_RV = unembed(x_BTD.reshape(-1, x_BTD.shape[-1]), table)
        return logits_RV.reshape(*x_BTD.shape[:2], -1)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: CacheT | None = None,
        *,
        execution: Execution = ONE_DEVICE,
    ) -> tuple[jax.Array, CacheT | None]:
        """Float32 logits [B, T, V], and the updated cache if one came in."""
        x_BTD, cache = self.hidden(tokens_BT, cache, execution=execution)
        return self.logits(x_BTD), cache


def _step(
    positions: Positions,
    attention: AttentionFunction,
    execution: Execution,
    in_scan: bool,
) -> Callable[[jax.Array, tuple[Block, jax.Array | None]], tuple[jax.Array, None]]:
    """The body of a loop over blocks: (residual stream, (block, dropout key)) to (stream, None)."""

    def step(x_BTD: jax.Array, layer: tuple[Block, jax.Array | None]) -> tuple[jax.Array, None]:
        block, key = layer
        gathered = execution.gathered(block, x_BTD.dtype)
        return gathered(x_BTD, positions, attention, execution, dropout_key=key)[0], None

    return execution.rematerialized(step, in_scan)


# --- the layout for decoding ---


def unstack(model: Llama, *, consume: bool = False) -> Llama:
    """The model with its blocks as a list, the layout that decodes fast.

    Args:
      consume: delete each stacked array once its layers are copied, so that not all of them are in
        memory twice; `model` cannot be used afterwards.
    """
    if not isinstance(model.blocks, Block):
        return model
    leaves, structure = jax.tree.flatten(model.blocks)
    layers: list[list[jax.Array]] = [[] for _ in range(model.config.num_layers)]
    for array in leaves:
        for index, arrays in enumerate(layers):
            arrays.append(array[index])
        if consume:
            jax.block_until_ready([arrays[-1] for arrays in layers])
            array.delete()
    blocks = [jax.tree.unflatten(structure, arrays) for arrays in layers]

    def laid_out(_: str, layer: Linear | OutputsFirstLinear) -> nnx.Module:
        is_first = prefers_outputs_first(len(layer.outputs))
        return OutputsFirstLinear(layer) if is_first and isinstance(layer, Linear) else layer

    for block in blocks:
        replace_linears(block, laid_out)
    unstacked = jax.tree.map(lambda leaf: leaf, model)  # a shallow copy
    unstacked.blocks = nnx.List(blocks)
    return unstacked


def replace_linears(block: Block, make: Callable[[str, Any], nnx.Module]) -> None:
    """Replace each linear layer of a block by `make(its name, itself)`."""
    for part in (block.attention, block.ffn):
        for name, layer in vars(part).items():
            if isinstance(layer, Linear | OutputsFirstLinear):
                setattr(part, name, make(name, layer))
