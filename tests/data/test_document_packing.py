"""Packing: every target once, no row too long, the first row that fits, and little waste."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.sequences import OPEN_ROWS, SORTED, first_fit, pack

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def rows_of(packing):
    return [packing[row] for row in range(len(packing))]


def slow_first_fit(lengths, room, open_rows):
    """First fit as it is told: rows in a list, looked through from the oldest open one."""
    rows, numbers = [], []
    for length in lengths:
        for number in range(max(0, len(rows) - open_rows), len(rows)):
            if sum(rows[number]) + length <= room:
                break
        else:
            number = len(rows)
            rows.append([])
        rows[number].append(length)
        numbers.append(number)
    return numbers


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_every_token_but_a_documents_first_is_a_target_once(lengths, room):
    seen = [[0] * length for length in lengths]
    for row in rows_of(pack(lengths, room)):
        assert row
        assert sum(length for _, _, length in row) <= room
        for document, start, length in row:
            assert length >= 1
            for place in range(start + 1, start + length + 1):
                seen[document][place] += 1
    assert seen == [[0] * min(length, 1) + [1] * (length - 1) for length in lengths]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_only_documents_longer_than_a_row_are_cut(lengths, room):
    pieces = [0] * len(lengths)
    for row in rows_of(pack(lengths, room)):
        for document, start, _ in row:
            assert start % room == 0
            pieces[document] += 1
    assert pieces == [-(-max(length - 1, 0) // room) for length in lengths]


@settings(deadline=None)
@given(st.lists(st.integers(1, 17), max_size=80), st.integers(1, 9))
def test_first_fit_is_the_first_that_fits(lengths, open_rows):
    found = first_fit(np.array(lengths, int), 17, open_rows)
    assert found.tolist() == slow_first_fit(lengths, 17, open_rows)


def test_only_the_rows_opened_last_are_looked_at():
    lengths = np.array([6, 7, 8, 3])
    assert first_fit(lengths, 10, open_rows=3).tolist() == [0, 1, 2, 0]
    assert first_fit(lengths, 10, open_rows=2).tolist() == [0, 1, 2, 1]
    assert first_fit(lengths, 10, open_rows=1).tolist() == [0, 1, 2, 3]


def test_a_packing_by_hand():
    packing = pack([4, 9, 1, 12, 0, 3, 2], 5)  # 3, 5 + 3, none, 5 + 5 + 1, none, 2 and 1 targets
    assert rows_of(packing) == [
        [(0, 0, 3), (5, 0, 2)],
        [(1, 0, 5)],
        [(1, 5, 3), (3, 10, 1), (6, 0, 1)],
        [(3, 0, 5)],
        [(3, 5, 5)],
    ]
    assert (packing.positions, packing.efficiency) == (25, 1.0)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_rows_and_pieces_stand_in_the_order_of_documents(lengths, room):
    rows = rows_of(pack(lengths, room))
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_at_most_one_row_of_pieces_is_less_than_half_full(lengths, room):
    rows = rows_of(pack(lengths, room))  # fewer than the open rows: else two could be
    filled = [sum(length for _, _, length in row) for row in rows]
    assert sum(2 * length <= room for length in filled) <= 1


@pytest.mark.parametrize(("room", "efficiency"), [(256, 0.93), (1024, 0.99), (2048, 0.995)])
def test_little_is_wasted_on_lengths_like_those_of_short_stories(room, efficiency):
    random = np.random.default_rng(0)
    lengths = np.maximum(20, random.lognormal(np.log(195), 0.45, 8 * SORTED)).astype(int)
    packing = pack(lengths, room)
    assert len(packing) > OPEN_ROWS / 2
    assert efficiency < packing.efficiency <= 1
    assert packing.positions == (lengths - 1).sum()


def test_full_rows_close_no_others():
    targets = np.random.default_rng(1).integers(1, 64 * 30, 2000)  # 30 full rows to a rest
    rests = targets % 64
    packing, of_rests = pack(targets + 1, 64), pack(rests[rests > 0] + 1, 64)
    assert len(packing) == (targets // 64).sum() + len(of_rests)


@pytest.mark.parametrize("lengths", [[], [0, 1, 1]])
def test_without_targets_there_are_no_rows(lengths):
    packing = pack(np.array(lengths, np.uint64), 5)
    assert (len(packing), packing.positions, packing.efficiency) == (0, 0, 0)
