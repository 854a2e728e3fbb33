"""Checksums: the same in whatever portions they are computed, others for other bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoints.save import checksums, partial_checksum


def by_hand(array):
    """The definition, in Python's integers."""
    bits = np.asarray(array).reshape(-1).view(f"uint{array.dtype.itemsize * 8}").tolist()
    return sum(value * (2 * place + 1) for place, value in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "bool"])
def test_device_host_and_definition_agree(dtype):
    random = np.random.default_rng(0).standard_normal((3, 7, 5), np.float32)
    array = np.asarray(jnp.asarray(100 * random).astype(dtype))
    expected = by_hand(array)
    assert checksums({"a": array}) == {"a": expected}
    assert partial_checksum(array, part=17) == expected
    by_layer = [partial_checksum(layer, index * 35, part=17) for index, layer in enumerate(array)]
    assert sum(reversed(by_layer)) % 2**32 == expected


def test_views_and_single_numbers_have_one():
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert partial_checksum(array.T) == by_hand(array.T.copy())
    assert partial_checksum(np.float32(3).reshape(())) == checksums({"a": jnp.float32(3)})["a"]
    assert partial_checksum(np.zeros((0, 4), np.float32)) == 0


def test_a_changed_or_moved_number_changes_it():
    array = np.arange(1, 9, dtype=np.float16)
    swapped, negated = array.copy(), array.copy()
    swapped[[2, 3]] = swapped[[3, 2]]
    negated[5] *= -1
    assert len({partial_checksum(x) for x in (array, swapped, negated)}) == 3
