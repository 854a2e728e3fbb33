"""The estimates against what the TPU compiler said, recorded by `tests/golden/make_plans.py`."""

import json
from pathlib import Path

import pytest

from llama_jax import cli
from llama_jax.config import Config
from llama_jax.config_parsing import parse
from llama_jax.planning.alternatives import estimate
from llama_jax.planning.table import on_all_chips
from llama_jax.planning.targets import parse_target

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "plans.json").read_text())


@pytest.mark.parametrize("key", GOLDEN["plans"])
def test_an_estimate_is_within_fifteen_percent_of_the_compiler(key):
    name, target = key.split()[0], parse_target(key.split()[1])
    path = str(REPOSITORY / "configs" / f"{name}.py")
    config = parse(Config, cli.config_from_flags([], path))
    memory = estimate(on_all_chips(config, target.devices), target).memory
    said = GOLDEN["plans"][key]["gib"]
    assert memory.total / 2**30 == pytest.approx(said, rel=0.15)


def test_the_record_names_its_versions():
    assert {"jax", "jaxlib", "libtpu", "flax"} <= GOLDEN["versions"].keys()
