"""The cosines and sines in llama2.c's first format, bit for bit as its exporter writes them.

Every reader skips them and computes its own; they matter only so that a file that is read and
written is the same file. The exporter is PyTorch on an x86 CPU, whose cosine is neither the nearest
float32 nor NumPy's. Comparing millions of its values shows what it is: a polynomial in float64,
rounded once. Contexts up to 4,096 and heads of 8, 16, 32, 48, 64 and 128 come out as there;
elsewhere a number may differ in its last bit.
"""

from collections.abc import Iterator

import numpy as np

ROWS = 4096  # positions at a time
THETA = 10000.0
# Beside r itself, the coefficients of r³, r⁵, r⁷ and r⁹ in the odd polynomial that is nearest to
# the sine, in relative error, from 0 to π/2 (a Remez exchange finds them; the error is 6e-9).
SINE = (-0.16666659550427756, 0.008333066246082155, -0.0001980960290193795, 2.605780637968037e-06)


def rotary_table(context_length: int, head_dim: int) -> Iterator[np.ndarray]:
    """The cosines [S, H/2] and then the sines [S, H/2], in float32, some rows at a time."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = (THETA ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    for function in (cosine, sine):
        for start in range(0, context_length, ROWS):
            stop = min(start + ROWS, context_length)
            angles = np.outer(np.arange(start, stop, dtype=np.float32), frequencies)
            yield function(angles.astype(np.float64)).astype(np.float32)


def sine(angles: np.ndarray) -> np.ndarray:
    """The sine of float64 angles with an error of at most 6e-9 of it."""
    half_turns = np.rint(angles / np.pi)
    return _central_sine(angles - half_turns * np.pi) * _sign(half_turns)


def cosine(angles: np.ndarray) -> np.ndarray:
    """The cosine of float64 angles with an error of at most 6e-9 of it."""
    half_turns = np.floor(angles / np.pi)
    return -_central_sine(angles - (half_turns + 0.5) * np.pi) * _sign(half_turns)


def _sign(half_turns: np.ndarray) -> np.ndarray:
    """1 after an even number of half turns, else -1."""
    return 1 - 2 * (half_turns % 2)


def _central_sine(angles: np.ndarray) -> np.ndarray:
    """The sine from -π/2 to π/2."""
    squares, total = angles * angles, np.zeros_like(angles)
    for coefficient in reversed(SINE):
        total = total * squares + coefficient
    return angles * (total * squares) + angles
