"""How GGUF stores numbers: plain, or in blocks that share a scale. The layouts are ggml's.

Knows neither headers nor names.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from llama_jax.formats.finite import is_finite
from llama_jax.formats.weights import DTYPES, Tensor

CHUNK = 2**15  # blocks converted at once, so that temporaries stay small
FLOAT32, FLOAT16, BFLOAT16 = (DTYPES[name] for name in ("float32", "float16", "bfloat16"))
NAMES = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"}
NAMES |= {13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
NAMES |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32"}
NAMES |= {27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}


def _scale(blocks: np.ndarray) -> np.ndarray:
    """The float16 in two bytes of each block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks).view(FLOAT16).astype(np.float32)


def _from_q8_0(blocks: np.ndarray) -> np.ndarray:
    """A scale, then 32 int8."""
    return _scale(blocks[:, :2]) * blocks[:, 2:].view(np.int8)


def _from_q4_0(blocks: np.ndarray) -> np.ndarray:
    """A scale, then 16 bytes: elements 0–15 in their low halves, 16–31 in their high ones."""
    packed = blocks[:, 2:]
    levels = np.concatenate([packed & 15, packed >> 4], axis=1).view(np.int8) - np.int8(8)
    return _scale(blocks[:, :2]) * levels


def _from_q6_k(blocks: np.ndarray) -> np.ndarray:
    """Twice 128 numbers: low 4 bits in 64 bytes, high 2 bits in 32; a scale for every 16 of them.

    Of each 128, number 32·i + j has its low bits in half i // 2 of byte j or 32 + j, and its high
    ones in the pair of bits i of byte j.
    """
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    low = np.stack([low & 15, low >> 4], axis=2)  # [blocks, 128s, halves, bytes' 32s, j]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    levels = low.reshape(-1, 2, 4, 32) | (high & 3) << 4
    levels = levels.view(np.int8).reshape(-1, 16, 16) - np.int8(32)
    scales = _scale(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)
    return (scales[:, :, None] * levels).reshape(-1, 256)


def _to_q8_0(numbers: np.ndarray) -> np.ndarray:
    """The inverse of `_from_q8_0` but for rounding, which is to nearest, halves away from zero."""
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    inverse, stored = 1 / scale, scale.astype(FLOAT16)
    numbers = numbers * np.where(np.isfinite(inverse), inverse, 0)  # zeros, or nearly
    whole = np.trunc(numbers)
    levels = whole + np.trunc(2 * (numbers - whole))
    return np.concatenate([stored.view(np.uint8), levels.astype(np.int8).view(np.uint8)], axis=1)


@dataclasses.dataclass(frozen=True)
class StoredType:
    """A way to store numbers: `count` of them in `nbytes`, read as `dtype`."""

    name: str
    count: int
    nbytes: int
    dtype: np.dtype = FLOAT32
    unpack: Callable[[np.ndarray], np.ndarray] | None = None  # uint8 [n, nbytes] → [n, count]
    pack: Callable[[np.ndarray], np.ndarray] | None = None  # float32 [n, count] → [n, nbytes]

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor takes; its rows must be whole blocks."""
        return math.prod(shape) // self.count * self.nbytes


F32 = StoredType("F32", 1, 4)
F16 = StoredType("F16", 1, 2, FLOAT16)
BF16 = StoredType("BF16", 1, 2, BFLOAT16)
Q8_0 = StoredType("Q8_0", 32, 34, unpack=_from_q8_0, pack=_to_q8_0)
TYPES = {  # by ggml's number
    0: F32,
    1: F16,
    2: StoredType("Q4_0", 32, 18, unpack=_from_q4_0),
    8: Q8_0,
    14: StoredType("Q6_K", 256, 210, unpack=_from_q6_k),  # outputs of most files of Q4_0
    30: BF16,
}


def type_name(number: int) -> str:
    """The name of any of ggml's types."""
    known = TYPES[number].name if number in TYPES else NAMES.get(number, "")
    return known or f"type {number}"


def unpacked(packed: Tensor, shape: tuple[int, ...], kind: StoredType) -> Tensor:
    """The numbers promised by the bytes [blocks, kind.nbytes] that hold them, as float32."""

    @np.errstate(invalid="ignore")  # a scale that is no number makes none
    def read() -> np.ndarray:
        assert kind.unpack
        blocks, numbers = packed.read(), np.empty((packed.shape[0], kind.count), np.float32)
        for start in range(0, len(blocks), CHUNK):
            numbers[start : start + CHUNK] = kind.unpack(blocks[start : start + CHUNK])
        return numbers.reshape(shape)

    return Tensor(shape, kind.dtype, read)


@np.errstate(all="ignore")  # what does not fit is looked for afterwards
def stored(array: np.ndarray, kind: StoredType) -> np.ndarray:
    """An array whose rows are whole blocks as the bytes that hold it, uint8.

    Raises:
      OverflowError: if it has a number that float16 cannot hold, be it as itself or as a scale.
    """
    if kind.pack is None:
        converted = array.astype(kind.dtype, copy=False)
        fits = kind != F16 or array.dtype == FLOAT16 or is_finite(converted)
    else:
        converted = _packed(array.reshape(-1, kind.count), kind)
        fits = bool(np.isfinite(_scale(converted[:, :2])).all())
    if not fits:
        raise OverflowError
    return converted.reshape(-1).view(np.uint8)


def _packed(numbers: np.ndarray, kind: StoredType) -> np.ndarray:
    """Blocks [n, kind.nbytes] of numbers [n, kind.count]."""
    assert kind.pack
    blocks = np.empty((len(numbers), kind.nbytes), np.uint8)
    for start in range(0, len(numbers), CHUNK):
        chunk = numbers[start : start + CHUNK].astype(np.float32)
        blocks[start : start + CHUNK] = kind.pack(chunk)
    return blocks
