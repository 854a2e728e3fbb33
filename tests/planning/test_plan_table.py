"""The table of which config fits where."""

import pytest
from plans import make_config

from llama_jax.planning.report import CAPTION, cell, over_all_chips, table
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import estimate

CONFIG = make_config(data__batch_size=48, optimizer__accumulation_steps=6)


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 6), (8, 6), (16, 3), (48, 1)])
def test_a_config_is_sharded_over_all_chips_in_microbatches_that_divide(devices, microbatches):
    way = over_all_chips(CONFIG, devices)
    assert (way.mesh.data, way.mesh.fsdp, way.mesh.tensor) == (1, devices, 1)
    assert way.optimizer.accumulation_steps == microbatches
    assert way.data == CONFIG.data


def test_a_batch_smaller_than_the_chips_is_a_dash():
    assert over_all_chips(CONFIG, 32) is None
    assert cell(CONFIG, parse_target("v5p-64")) == "–"


def test_what_fits_is_bold_and_in_gib():
    total = estimate(over_all_chips(CONFIG, 8), parse_target("v5e-8")).memory.total / 2**30
    assert cell(CONFIG, parse_target("v5e-8")) == f"**{total:.2f}**"


def test_what_does_not_fit_has_an_alternative():
    large = make_config(data__batch_size=2**17)  # in one microbatch
    first, arrow, second = cell(large, parse_target("v5e-1")).split()
    assert arrow == "→" and float(first) > 15.75 > float(second.strip("*†‡"))


def test_the_table_is_markdown_with_a_caption():
    text = table({"small": CONFIG}, ("v5e-1", "H200-8"))
    header, rule, row, empty, *caption = text.splitlines()
    assert header == "| config | v5e-1 | H200-8 |" and rule == "| --- | --- | --- |"
    assert row.startswith("| `small` | **") and empty == "" and "\n".join(caption) == CAPTION
