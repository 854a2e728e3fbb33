"""Llama 2 (Touvron et al. 2023): mathematics only, no mesh, no files, no flags.

One model, two arrangements of its blocks. Trained and stored, they are one `Block` whose arrays
have a leading layer dim, run by `lax.scan`: constant compile time. Decoding, they are a list made
once by `arrangement.unstack`, each layer with its own cache: the cache never goes through a scan.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config import ModelConfig
from llama_jax.distributed.fsdp import whole
from llama_jax.distributed.mesh import constrain
from llama_jax.kernels.attention import SelfAttention, self_attention
from llama_jax.kernels.matmul import platform
from llama_jax.model.attention import Attention, Cache, Look, causal_mask, look_into_cache
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import rematerialised
from llama_jax.model.layers import Linear, RMSNorm, dropout, parameter, rows_of, times_table
from llama_jax.model.positions import positions_within, rotation


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, std: float, residual_std: float, rngs: nnx.Rngs):
        D, F = config.dim, config.ffn_dim
        self.gate = Linear((D,), (F,), ("embed", "mlp"), std=std, rngs=rngs)
        self.up = Linear((D,), (F,), ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Linear((F,), (D,), ("mlp", "embed"), std=residual_std, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(constrain(hidden_BTF, "batch", "", "mlp"))


class Block(nnx.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

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
        rotation: tuple[jax.Array, jax.Array],
        look: Look,
        cache: Cache = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        keys = [None] * 3 if dropout_key is None else list(jax.random.split(dropout_key, 3))
        normed_BTD = self.attention_norm(x_BTD)
        mixed_BTD, cache = self.attention(normed_BTD, rotation, look, cache, keys[0])
        x_BTD += dropout(mixed_BTD, self.dropout_rate, keys[1])
        x_BTD = constrain(x_BTD, "batch", "length", "residual")
        x_BTD += dropout(self.ffn(self.ffn_norm(x_BTD)), self.dropout_rate, keys[2])
        return constrain(x_BTD, "batch", "length", "residual"), cache


class Llama(nnx.Module):
    """The whole model: tokens in, logits out."""

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

    @property
    def output_VD(self) -> jax.Array:
        """The matrix that turns hidden states into logits."""
        return self.embedding[...] if self.config.tied_embeddings else self.output[...]

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        *,
        segments_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
        attention: SelfAttention | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The normed hidden states [B, T, D] before the output matrix, and the cache one on.

        With a cache, the tokens continue each row after the slots it has filled. Without one, rows
        may be packed with several documents, numbered by `segments_BT`: none sees another, and
        positions begin anew with each. Dropout happens only when a key is given. How the backward
        pass is paid for, `remat` says (see `rematerialised`), and `attention` is the kernel (see
        `self_attention`; by default the fastest here).
        """
        T = tokens_BT.shape[1]
        config, start_B = self.config, jnp.zeros(1, jnp.int32)
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
        if cache is not None:
            start_B = cache.length_B
            positions_BT = start_B[:, None] + positions_BT
            look = look_into_cache(causal_mask(positions_BT, cache.slots), start_B)
        else:
            if segments_BT is not None:
                positions_BT = positions_within(segments_BT)
            look = self._look_within(attention, segments_BT, dropout_key is not None)
        turn = rotation(positions_BT, config.head_dim, config.rope_theta, config.rope_scaling)
        keys = _layer_keys(dropout_key, config.num_layers)

        x_BTD = rows_of(self.embedding, tokens_BT, jnp.dtype(config.compute_dtype))
        x_BTD = dropout(x_BTD, config.dropout, keys[0])
        x_BTD = constrain(x_BTD, "batch", "length", "residual")
        if isinstance(self.blocks, Block):
            assert cache is None, "a cache needs an unstacked model; see `arrangement.unstack`"
            x_BTD = _scan(self.blocks, x_BTD, turn, look, keys[1], remat)
        else:
            layers = []
            for index, block in enumerate(self.blocks):
                layer = cache.layers[index] if cache else None
                key = None if keys[1] is None else keys[1][index]
                x_BTD, layer = block(x_BTD, turn, look, layer, key)
                layers.append(layer)
            if cache is not None:
                cache = KVCache(tuple(layers), cache.length_B + T)
        return whole(self.norm, x_BTD.dtype)(x_BTD), cache

    def _look_within(
        self, attention: SelfAttention | None, segments_BT: jax.Array | None, drops: bool
    ) -> Look:
        """Attention among the tokens themselves."""
        rate = self.config.dropout if drops else 0.0
        kernel = attention or self_attention("auto", self.config, rate)

        def look(q_BTNH, k_BTKH, v_BTKH, _cache, key):  # type: ignore[no-untyped-def]
            return kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT, rate, key if rate else None), None

        return look

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states."""
        table = self.embedding if self.config.tied_embeddings else self.output
        logits_RV = times_table(x_BTD.reshape(-1, x_BTD.shape[-1]), table)
        return logits_RV.reshape(*x_BTD.shape[:2], -1)

    def __call__(
        self, tokens_BT: jax.Array, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Float32 logits [B, T, V], and the cache one on if one came in."""
        x_BTD, cache = self.hidden(tokens_BT, cache)
        return self.logits(x_BTD), cache


def _layer_keys(
    key: jax.Array | None, num_layers: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """A key for the embedding and one for each layer, or nothing."""
    if key is None:
        return None, None
    embedding_key, blocks_key = jax.random.split(key)
    return embedding_key, jax.random.split(blocks_key, num_layers)


def _scan(
    blocks: Block,
    x_BTD: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    look: Look,
    keys_L: jax.Array | None,
    remat: str,
) -> jax.Array:
    """Run stacked blocks one after the other."""

    def step(x_BTD: jax.Array, layer: tuple[Block, jax.Array | None]) -> tuple[jax.Array, None]:
        block, key = layer
        return whole(block, x_BTD.dtype)(x_BTD, turn, look, dropout_key=key)[0], None

    step = rematerialised(step, remat)
    return jax.lax.scan(step, x_BTD, (blocks, keys_L), unroll=_unrolled_layers(remat))[0]


def _unrolled_layers(remat: str) -> int:
    """Blocks a turn of the scan: on CPU, rolling up copies what each layer keeps; 5 % slower.

    Blocks that are computed again stay rolled up: unrolled, all of them are in memory together.
    """
    return 16 if platform() == "cpu" and remat == "none" else 1


def abstract(config: ModelConfig) -> Llama:
    """The model with shapes in place of arrays; costs no memory."""
    return jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))


def count_parameters(config: ModelConfig) -> int:
    """How many numbers the model learns."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))
