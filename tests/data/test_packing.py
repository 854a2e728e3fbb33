"""Packing: every target once, no overfull example, first fit, and little waste."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.datasets import OPEN_BINS, SORT_WINDOW, first_fit, pack

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def examples(packing):
    return [packing[index] for index in range(len(packing))]


def slow_first_fit(lengths, capacity, open_bins):
    """First fit by its definition, searching lists from the oldest open bin."""
    bins, numbers = [], []
    for length in lengths:
        for number in range(max(0, len(bins) - open_bins), len(bins)):
            if sum(bins[number]) + length <= capacity:
                break
        else:
            number = len(bins)
            bins.append([])
        bins[number].append(length)
        numbers.append(number)
    return numbers


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_every_token_but_a_documents_first_is_a_target_once(lengths, capacity):
    seen = [[0] * length for length in lengths]
    for sequence in examples(pack(lengths, capacity)):
        assert sequence
        assert sum(length for _, _, length in sequence) <= capacity
        for document, start, length in sequence:
            assert length >= 1
            for place in range(start + 1, start + length + 1):
                seen[document][place] += 1
    assert seen == [[0] * min(length, 1) + [1] * (length - 1) for length in lengths]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_only_long_documents_are_cut(lengths, capacity):
    pieces = [0] * len(lengths)
    for sequence in examples(pack(lengths, capacity)):
        for document, start, _ in sequence:
            assert start % capacity == 0
            pieces[document] += 1
    assert pieces == [-(-max(length - 1, 0) // capacity) for length in lengths]


@settings(deadline=None)
@given(st.lists(st.integers(1, 17), max_size=80), st.integers(1, 9))
def test_first_fit_matches_its_definition(lengths, open_bins):
    found = first_fit(np.array(lengths, int), 17, open_bins)
    assert found.tolist() == slow_first_fit(lengths, 17, open_bins)


def test_only_the_bins_opened_last_are_searched():
    lengths = np.array([6, 7, 8, 3])
    assert first_fit(lengths, 10, open_bins=3).tolist() == [0, 1, 2, 0]
    assert first_fit(lengths, 10, open_bins=2).tolist() == [0, 1, 2, 1]
    assert first_fit(lengths, 10, open_bins=1).tolist() == [0, 1, 2, 3]


def test_packing_of_a_small_example():
    packing = pack([4, 9, 1, 12, 0, 3, 2], 5)  # 3, 5 + 3, none, 5 + 5 + 1, none, 2 and 1 targets
    assert examples(packing) == [
        [(0, 0, 3), (5, 0, 2)],
        [(1, 0, 5)],
        [(1, 5, 3), (3, 10, 1), (6, 0, 1)],
        [(3, 0, 5)],
        [(3, 5, 5)],
    ]
    assert (packing.positions, packing.efficiency) == (25, 1.0)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_examples_and_pieces_are_in_document_order(lengths, capacity):
    sequences = examples(pack(lengths, capacity))
    assert all(sequence == sorted(sequence) for sequence in sequences)
    assert [sequence[0] for sequence in sequences] == sorted(sequence[0] for sequence in sequences)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_at_most_one_example_is_less_than_half_full(lengths, capacity):
    sequences = examples(pack(lengths, capacity))  # fewer than the open bins: else two could be
    filled = [sum(length for _, _, length in sequence) for sequence in sequences]
    assert sum(2 * length <= capacity for length in filled) <= 1


@pytest.mark.parametrize(("capacity", "efficiency"), [(256, 0.93), (1024, 0.99), (2048, 0.995)])
def test_efficiency_on_lengths_of_short_stories(capacity, efficiency):
    random = np.random.default_rng(0)
    lengths = np.maximum(20, random.lognormal(np.log(195), 0.45, 8 * SORT_WINDOW)).astype(int)
    packing = pack(lengths, capacity)
    assert len(packing) > OPEN_BINS / 2
    assert efficiency < packing.efficiency <= 1
    assert packing.positions == (lengths - 1).sum()


def test_full_examples_do_not_take_open_bins():
    targets = np.random.default_rng(1).integers(1, 64 * 30, 2000)  # 30 full examples to a rest
    rests = targets % 64
    packing, of_rests = pack(targets + 1, 64), pack(rests[rests > 0] + 1, 64)
    assert len(packing) == (targets // 64).sum() + len(of_rests)


@pytest.mark.parametrize("lengths", [[], [0, 1, 1]])
def test_no_targets_give_no_examples(lengths):
    packing = pack(np.array(lengths, np.uint64), 5)
    assert (len(packing), packing.positions, packing.efficiency) == (0, 0, 0)
