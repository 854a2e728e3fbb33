"""Estimates against the figures of the TPU compiler, recorded by `tests/golden/make_plans.py`."""

import json
import sys
from pathlib import Path

import pytest
from cases import slow_but

from llama_jax.planning.decoding import plan_decoding
from llama_jax.planning.training import estimate

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "plans.json").read_text())
sys.path.insert(0, str(REPOSITORY / "tests" / "golden"))
from make_plans import decoded, planned  # noqa: E402

PLANNED = {key: (way, target) for key, way, target in planned()}
# A second for each plan, in which a model is traced.
QUICK = [f"{name} v5e-8" for name in ("demo", "110m", "110m_tpu", "7b", "llama3_70b")]
DECODED = {key: plan for key, *plan in decoded()}


@pytest.mark.parametrize("key", slow_but(QUICK, GOLDEN["plans"]))
def test_an_estimate_is_within_fifteen_percent_of_the_compiler(key):
    memory = estimate(*PLANNED[key]).memory
    compiled = GOLDEN["plans"][key]["gib"]
    assert memory.total / 2**30 == pytest.approx(compiled, rel=0.15)


@pytest.mark.parametrize("key", GOLDEN["decoding"])
def test_a_decode_estimate_is_within_ten_percent_of_the_compiler(key):
    estimated = plan_decoding(*DECODED[key]).estimated
    assert estimated / 2**30 == pytest.approx(GOLDEN["decoding"][key]["gib"], rel=0.1)


def test_every_plan_is_recorded():
    assert PLANNED.keys() == GOLDEN["plans"].keys()
    assert DECODED.keys() == GOLDEN["decoding"].keys()


def test_the_record_has_its_versions():
    assert {"jax", "jaxlib", "libtpu", "flax"} <= GOLDEN["versions"].keys()
