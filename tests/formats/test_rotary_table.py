"""The tables of llama2.c's first version: to the bit of a real file, and near the truth."""

import numpy as np
import pytest

from llama_jax.formats.llama2c import rotary_table as module
from llama_jax.formats.llama2c.rotary_table import cosine, rotary_table, sine


def table(context_length, head_dim):
    rows = np.concatenate(list(rotary_table(context_length, head_dim)))
    return rows.reshape(2, context_length, head_dim // 2)


def test_it_is_a_real_files_to_the_bit(shared_data):
    raw = (shared_data / "stories260K.bin").read_bytes()
    stored = np.frombuffer(raw[-4 * 512 * 8 :], np.float32).reshape(2, 512, 4)
    ours = table(512, 8)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, stored)
    angles = np.arange(512, dtype=np.float32)[:, None] * np.float32([1, 0.1, 0.01, 0.001])
    nearest = np.cos(angles.astype(np.float64)).astype(np.float32)
    assert (nearest != stored[0]).any(), "the nearest numbers would do"


@pytest.mark.parametrize(("context_length", "head_dim"), [(1, 2), (100, 6), (5000, 128)])
def test_it_is_near_the_truth(context_length, head_dim):
    frequencies = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(context_length)[:, None] * frequencies
    atol = 2e-7 * max(1, context_length)  # of the angles, which float32 rounds
    np.testing.assert_allclose(
        table(context_length, head_dim), [np.cos(angles), np.sin(angles)], atol=atol
    )


def test_portions_make_the_same_table(monkeypatch):
    whole = table(37, 6)
    monkeypatch.setattr(module, "ROWS", 5)
    assert [len(rows) for rows in rotary_table(37, 6)] == [5, 5, 5, 5, 5, 5, 5, 2] * 2
    np.testing.assert_array_equal(table(37, 6), whole)


def test_the_polynomial_is_as_near_as_it_says():
    angles = np.linspace(0.01, 40, 100_001)
    wrong = np.abs(sine(angles) - np.sin(angles)) / np.abs(np.sin(angles))
    assert 5e-9 < wrong.max() < 6.2e-9
    wrong = np.abs(cosine(angles) - np.cos(angles)) / np.abs(np.cos(angles))
    assert 5e-9 < wrong.max() < 6.2e-9
    assert (sine(np.zeros(1)), cosine(np.zeros(1)).astype(np.float32)) == (0, 1)
