"""Damage that was once met with a traceback or not at all, in its smallest form: corpus.jsonl.

`find` and `replace` are bytes, as Latin-1. `was` says what happened.
"""

import json
from pathlib import Path

import fuzz
import pytest
from readers import READERS

FILE = Path(__file__).parent / "corpus.jsonl"
CASES = [json.loads(line) for line in FILE.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['reader']}: {case['was']}")
def test_known_damage(case, tmp_path):
    reader = READERS[case["reader"]]
    reader.make(tmp_path)
    intact = {reader.read(tmp_path)}
    paths = [path for path in tmp_path.glob(reader.files) if path.is_file()]
    (path,) = [path for path in paths if path.name == case.get("file", path.name)]
    good = path.read_bytes()
    part = reader.inner(good)
    bad = part.replace(case["find"].encode("latin-1"), case["replace"].encode("latin-1"), 1)
    assert bad != part, "the example has changed: write the case anew"
    path.write_bytes(reader.outer(bad, good))
    outcome, fault = fuzz.outcome(reader, tmp_path, intact)
    assert outcome in ("refused", "warned"), fault
