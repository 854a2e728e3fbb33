"""NaN and infinity are found wherever they lie, and nothing else is taken for them."""

import numpy as np
import pytest

from llama_jax.formats import finite
from llama_jax.formats.finite import is_finite
from llama_jax.formats.weights import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_is_told_right(dtype):
    """All there are of 16 bits; of 32, all with other low bits zero or one."""
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits.view(DTYPES[dtype])
    if dtype == "float32":
        wide = bits.astype(np.uint32) << 16
        numbers = np.stack([wide, wide | 1]).view(np.float32).reshape(-1)
    expected = np.isfinite(numbers.astype(np.float32))
    found = [is_finite(number) for number in numbers.reshape(-1, 1)[::7]]
    assert found == expected[::7].tolist()
    assert is_finite(numbers[expected]) and not is_finite(numbers)


@pytest.mark.parametrize("place", [0, 16, 17, 18, 209])
def test_one_is_found_in_any_portion_of_any_view(monkeypatch, place):
    monkeypatch.setattr(finite, "PORTION", 17)
    array = np.ones((3, 7, 10), np.float32)
    array.flat[place] = np.nan
    for view in (array, array.T, array.swapaxes(0, 1), array[::-1], array[:, :, ::-1]):
        assert not is_finite(view)
    array.flat[place] = 1e30
    assert is_finite(array) and is_finite(array.T)
    assert is_finite(np.zeros((0, 3), np.float16))
