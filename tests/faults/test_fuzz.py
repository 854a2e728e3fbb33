"""Damaged files are refused in one line or read rightly, by everything that reads files.

FAULTS=long damages a hundred times as many; FAULTS_SEED=1 others.
"""

import os

import fuzz
import pytest
from readers import READERS

pytestmark = pytest.mark.faults
SHORT = 150  # damaged files of each reader
# How many times slower than others they are.
SLOW = {"converted-int4": 5, "run-loaded": 2, "run-resumed": 3, "adapters": 5, "peft": 3}
LONG = 100


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files(reader, tmp_path):
    is_long = os.environ.get("FAULTS") == "long"
    rounds = SHORT // SLOW.get(reader, 1) * (LONG if is_long else 1)
    seed = int(os.environ.get("FAULTS_SEED", "0"))
    report = fuzz.run(reader, rounds, seed, keep=str(tmp_path / "kept"))
    assert not report.faults, f"fuzz.py --seed {seed} {reader}"
    assert report.counts.total() == rounds
