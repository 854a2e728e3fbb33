"""docs/config.md is what its command makes, and explains every setting."""

import runpy

from tiny_run import REPOSITORY

MAKE = runpy.run_path(str(REPOSITORY / "docs" / "make_config_page.py"))


def test_page_is_current():
    current = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert current == MAKE["page"](), "run: python docs/make_config_page.py"


def test_every_setting_has_a_meaning():
    assert not [line for line in MAKE["page"]().splitlines() if line.endswith("|  |")]
