"""How a model knows the positions of its tokens, by `model.position`, as three hooks.

`Positions.embed` adds to the embedding: a learned table ("absolute"; Gehring et al. 2017) or
sines and cosines ("sinusoidal"; Vaswani et al. 2017). `Positions.rotate` rotates queries and keys
("rope"; Su et al. 2021, RoFormer). `Positions.bias` gives slopes by which attention lowers scores
with distance: those of Press et al. 2022 ("alibi"), or learned ones ("relative"). With "none" only
the causal mask tells positions apart (Haviv et al. 2022).

Inside this package the two members of a rotated pair lie in the two *halves* of a head, so the
rotation (`kernels.rotation`) needs no strided access. Formats that interleave them are permuted in
`formats`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.kernels.rotation import rotate
from llama_jax.kernels.triton import segment_starts


@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions of the tokens of one forward pass, as its blocks use them."""

    config: ModelConfig
    positions_BT: jax.Array  # int32; B may be 1
    rotary: tuple[jax.Array, jax.Array] | None  # cosines and sines, of "rope"

    @classmethod
    def of(cls, config: ModelConfig, positions_BT: jax.Array) -> "Positions":
        """The positions as a model of this config encodes them."""
        rotary = None
        if config.position == "rope":
            rotary = rotary_embedding(
                positions_BT, config.head_size, config.rope_theta, config.rope_scaling
            )
        return cls(config, positions_BT, rotary)

    def embed(self, x_BTD: jax.Array, table_SD: jax.Array | None) -> jax.Array:
        """The embeddings of tokens with those of their positions added.

        Args:
          table_SD: the learned table of "absolute". Positions beyond it have its last row, so that
            padding may lie there.
        """
        if table_SD is not None:
            rows_BTD = jnp.take(table_SD, self.positions_BT, axis=0, mode="clip")
            return x_BTD + rows_BTD.astype(x_BTD.dtype)
        if self.config.position == "sinusoidal":
            waves_BTD = sinusoids(self.positions_BT, self.config.dim)
            # Vaswani et al. multiply embeddings of standard deviation 1/√D by √D. Ours are not
            # scaled; waves in their proportion do not drown them.
            return x_BTD + (self.config.init_std * waves_BTD).astype(x_BTD.dtype)
        return x_BTD

    def rotate(self, x_BTNH: jax.Array) -> jax.Array:
        """Queries or keys, rotated where positions are rotations."""
        return x_BTNH if self.rotary is None else rotate(x_BTNH, *self.rotary)

    def bias(self, learned_N: jax.Array | None) -> jax.Array | None:
        """By how much the score of each head falls per position of distance, float32 [N].

        Args:
          learned_N: the slopes of "relative".
        """
        if self.config.position == "alibi":
            return jnp.asarray(alibi_slopes(self.config.num_heads))
        return learned_N


def sinusoids(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Float32 [B, T, D]: sines in even dims and cosines in odd ones, of wavelengths 2π to 20,000π.

    Vaswani et al. 2017, section 3.5.
    """
    frequencies_C = np.float32(10000.0) ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    angles_BTC = positions_BT.astype(jnp.float32)[:, :, None] * frequencies_C[None, None]
    pairs_BTC2 = jnp.stack([jnp.sin(angles_BTC), jnp.cos(angles_BTC)], axis=-1)
    return pairs_BTC2.reshape(*positions_BT.shape, -1)[:, :, :dim]


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes of ALiBi, float32 [N] (Press et al. 2022, section 3 and their code).

    2^(-8/N), its square, its cube, … where N is a power of two. Other numbers of heads have those
    of the power of two below N, then every other one of twice that.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([slopes, between])[:num_heads].astype(np.float32)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each of the H/2 pairs, float32 [H/2].

    `scaling` of kind "linear" divides them all (Chen et al. 2023, position interpolation); "llama3"
    divides those of long wavelengths only (Llama 3.1's `apply_scaling`), and so does "yarn" (Peng
    et al. 2023, as transformers computes it). "dynamic" leaves them within the original context.
    """
    plain = np.float32(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling.kind in ("none", "dynamic"):
        return plain
    scaled = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return scaled
    if scaling.kind == "yarn":
        kept = _yarn_kept(head_dim, theta, scaling)
        return kept * plain + (1 - kept) * scaled
    rotations = scaling.original_context * plain / (2 * math.pi)  # over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return kept * plain + (1 - kept) * scaled


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How much of each pair's frequency YaRN keeps, float32 [H/2]: from 1, linearly, to 0."""

    def pair(rotations: float) -> float:
        """The index, a fraction, of the pair that rotates so often in the original context."""
        wavelength = scaling.original_context / (2 * math.pi * rotations)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    return 1 - np.clip(ramp, 0.0, 1.0)


def attention_factor(scaling: RopeScaling) -> float:
    """What a scaling multiplies cosines and sines by, so that it appears squared in the scores."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotary_embedding(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, 1, H/2], of the angle of each pair at each position.

    In a "dynamic" scaling they depend on the length of the sequence, by which transformers means
    its last position here plus 1, padding included: all angles of a longer sequence differ. Keys in
    a cache keep the angles of the call that wrote them, there and here, so that beyond the original
    context decoding with a cache is not what a call with the whole sequence computes.
    """
    frequencies_H = frequencies(head_dim, theta, scaling)
    positions = positions_BT.astype(jnp.float32)[:, :, None, None]
    if scaling.kind == "dynamic":
        length_B1 = positions_BT.max(axis=1, keepdims=True).astype(jnp.float32) + 1
        ratio_B1 = scaling.factor * length_B1 / scaling.original_context - (scaling.factor - 1)
        # The base becomes theta · ratio^(H/(H-2)), which divides pair i by ratio^(2i/(H-2)).
        exponents_H = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim - 2)
        divisors_BH = jnp.maximum(ratio_B1, 1.0) ** exponents_H[None]
        angles = positions * (frequencies_H[None] / divisors_BH)[:, None, None]
    else:
        angles = positions * frequencies_H[None, None, None]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(scaling)
    return (cosine, sine) if factor == 1.0 else (factor * cosine, factor * sine)


def positions_within(segments_BT: jax.Array) -> jax.Array:
    """Positions [B, T] counted from the start of each segment; a segment is a run of equal ids."""
    index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    return index_T[None] - segment_starts(segments_BT)
