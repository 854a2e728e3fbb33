"""Damaged files are refused in one line or read rightly, by everything that reads files.

FAULTS=12 damages 12 times as many; FAULTS_SEED=1 others.
"""

import os

import fuzz
import pytest
from readers import READERS

pytestmark = pytest.mark.faults
SHORT = 100  # damaged files of each reader
# How many times slower than others they are.
SLOW = {"converted-int4": 5, "run-loaded": 2, "run-resumed": 3, "adapters": 5, "peft": 3}
NAMES = list(READERS)[::-1]  # those of trained runs, which take longest, first
EACH = -(-len(NAMES) // 4)
GROUPS = [NAMES[n : n + EACH] for n in range(0, len(NAMES), EACH)]  # each in its own process


@pytest.mark.parametrize("readers", GROUPS, ids=" ".join)
def test_damaged_files(readers, tmp_path):
    times = int(os.environ.get("FAULTS", "1"))
    rounds = {reader: SHORT // SLOW.get(reader, 1) * times for reader in readers}
    seed = int(os.environ.get("FAULTS_SEED", "0"))
    for report in fuzz.run(rounds, seed, keep=str(tmp_path / "kept")):
        assert not report.faults, f"fuzz.py --seed {seed} {report.reader}"
        assert report.counts.total() == rounds[report.reader]
