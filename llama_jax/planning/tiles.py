"""How a TPU lays an array out in its memory: in tiles of 8 × 128 numbers, filled up where need be.

Does not know which arrays there are.
"""

import itertools
import math

from llama_jax.attention.splash import LANES  # numbers in a row of a tile, too

SUBLANES = 8  # rows of a tile; of an axis of 1, 2 or 4, as many as that


def filled_up(shape: tuple[int, ...]) -> int:
    """How many numbers an array takes, laid out as the compiler would: with the least filling."""
    if len(shape) < 2:
        return _up(math.prod(shape), LANES)
    return min(
        math.prod(shape) // (rows * columns) * _up(columns, LANES) * _up(rows, _tile_rows(rows))
        for rows, columns in itertools.permutations(shape, 2)
    )


def filled_rows(shape: tuple[int, int]) -> int:
    """The same for a matrix that has to lie row by row, because rows are looked up in it."""
    rows, columns = shape
    return _up(rows, _tile_rows(rows)) * _up(columns, LANES)


def _tile_rows(rows: int) -> int:
    return next(tile for tile in (1, 2, 4, SUBLANES) if rows <= tile or tile == SUBLANES)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
