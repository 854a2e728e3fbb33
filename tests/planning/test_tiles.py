"""How a TPU lays arrays out."""

import pytest

from llama_jax.planning.memory import filled_rows, filled_up


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((), 128),
        ((3,), 128),
        ((1, 1), 128),
        ((8, 128), 8 * 128),
        ((1024, 16), 16 * 1024),  # the long axis lies along the lanes
        ((352, 16), 16 * 384),
        ((5, 256, 352), 5 * 256 * 352),  # 256 along the lanes, 352 in rows of eight
        ((4, 16, 2, 32), 4 * 16 * 2 * 128),
        ((7, 9, 6, 48), 8 * 9 * 6 * 128),
    ],
)
def test_the_axes_that_need_the_least_filling_are_tiled(shape, numbers):
    assert filled_up(shape) == numbers


def test_a_table_of_rows_is_filled_along_its_rows():
    assert filled_rows((1024, 16)) == 1024 * 128
    assert filled_rows((1023, 130)) == 1024 * 256
    assert filled_rows((2, 5)) == 2 * 128
