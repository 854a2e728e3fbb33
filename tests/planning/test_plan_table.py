"""The table of which config fits where."""

import pytest
from plans import make_config

from llama_jax.planning.report import CAPTION, cell, on_all_chips, table
from llama_jax.planning.search import estimate
from llama_jax.planning.targets import parse_target

CONFIG = make_config(data__batch_size=48, optimizer__accumulation_steps=6)


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 6), (8, 6), (16, 3), (48, 1)])
def test_a_config_is_cut_over_all_chips_with_the_microbatches_that_divide(devices, microbatches):
    way = on_all_chips(CONFIG, devices)
    assert (way.mesh.data, way.mesh.fsdp, way.mesh.tensor) == (1, devices, 1)
    assert way.optimizer.accumulation_steps == microbatches
    assert way.data == CONFIG.data


def test_more_chips_than_sequences_are_a_dash():
    assert on_all_chips(CONFIG, 32) is None
    assert cell(CONFIG, parse_target("v5p-64")) == "–"


def test_what_fits_is_bold_and_in_gib():
    total = estimate(on_all_chips(CONFIG, 8), parse_target("v5e-8")).memory.total / 2**30
    assert cell(CONFIG, parse_target("v5e-8")) == f"**{total:.2f}**"


def test_what_does_not_fit_names_what_would():
    large = make_config(data__batch_size=2**17)  # in one microbatch
    first, arrow, second = cell(large, parse_target("v5e-1")).split()
    assert arrow == "→" and float(first) > 15.75 > float(second.strip("*†‡"))


def test_the_table_is_markdown_with_a_caption():
    text = table({"small": CONFIG}, ("v5e-1", "H200-8"))
    header, rule, row, empty, *caption = text.splitlines()
    assert header == "| config | v5e-1 | H200-8 |" and rule == "| --- | --- | --- |"
    assert row.startswith("| `small` | **") and empty == "" and "\n".join(caption) == CAPTION
