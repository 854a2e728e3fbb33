"""Biases, penalties and the token counts they need, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference.sampler import (
    TokenCounts,
    add_bias,
    penalize_presence,
    penalize_repetition,
)

V = 7
PROMPTS = [[3, 3, 5], [1], [6, 5, 6, 4, 6]]


def test_prompts_are_counted():
    counts = TokenCounts.of(PROMPTS, V)
    expected = [[0, 0, 0, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 3]]
    assert counts.prompt_BV.tolist() == expected
    assert counts.prompt_BV.dtype == counts.generated_BV.dtype == jnp.int32
    assert counts.generated_BV.tolist() == np.zeros((3, V)).tolist()


def test_generated_tokens_of_active_sequences_are_counted():
    counts, add = TokenCounts.of(PROMPTS, V), jax.jit(TokenCounts.add)
    counts = add(counts, jnp.asarray([2, 2, 6]), jnp.asarray([True, False, True]))
    counts = add(counts, jnp.asarray([2, 0, 1]), jnp.asarray([True, True, False]))
    expected = [[0, 0, 2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    assert counts.generated_BV.tolist() == expected
    assert counts.prompt_BV.tolist() == TokenCounts.of(PROMPTS, V).prompt_BV.tolist()


# token            0  1  2  3  4   5
PROMPT = np.asarray([[0, 1, 2, 0, 0, 1]], np.int32)
GENERATED = np.asarray([[0, 0, 1, 3, 1, 0]], np.int32)
LOGITS = np.asarray([[2.0, 2.0, -2.0, 3.0, 0.0, -1.0]], np.float32)
COUNTS = TokenCounts(jnp.asarray(PROMPT), jnp.asarray(GENERATED))


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [(2, [2, 1, -4, 1.5, 0, -2]), (1, LOGITS[0]), (0.5, [2, 4, -1, 6, 0, -0.5])],
)
def test_repetition_penalty_covers_prompt_and_completion(penalty, expected):
    found = penalize_repetition(LOGITS, COUNTS, jnp.asarray([penalty]))
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("presence", "frequency", "expected"),
    [
        (0.5, 0, [2, 2, -2.5, 2.5, -0.5, -1]),
        (0, 0.25, [2, 2, -2.25, 2.25, -0.25, -1]),
        (0.5, 0.25, [2, 2, -2.75, 1.75, -0.75, -1]),
        (-1, -1, [2, 2, 0, 7, 2, -1]),
        (0, 0, LOGITS[0]),
    ],
)
def test_presence_and_frequency_cover_the_completion_only(presence, frequency, expected):
    found = penalize_presence(LOGITS, COUNTS, jnp.asarray([presence]), jnp.asarray([frequency]))
    np.testing.assert_array_equal(found[0], expected)


def test_each_sequence_has_its_own_biases():
    logits_BV = jnp.asarray(np.arange(12.0, dtype=np.float32).reshape(2, 6))
    none = 2**31 - 1
    ids_BI = np.asarray([[4, 0, none], [1, none, none]], np.int32)
    bias_BI = np.asarray([[0.5, -9, 100], [-3, 0, 0]], np.float32)
    found = jax.jit(add_bias)(logits_BV, ids_BI, bias_BI)
    assert found.tolist() == [[-9, 1, 2, 3, 4.5, 5], [6, 4, 8, 9, 10, 11]]
