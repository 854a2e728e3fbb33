"""A program restarts itself once, with huge pages enabled and the same arguments."""

import os
import subprocess
import sys

import pytest

from llama_jax.cli.startup import HUGE_PAGES, HUGE_PAGES_VARIABLE

SCRIPT = f"""
import os, sys
from llama_jax.cli.startup import use_huge_pages
print("start", flush=True)
use_huge_pages()
print(os.environ.get({HUGE_PAGES_VARIABLE!r}), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are enabled on Linux only")
@pytest.mark.parametrize(
    ("before", "after", "starts"),
    [
        ("", HUGE_PAGES, 2),
        ("glibc.malloc.perturb=0", f"glibc.malloc.perturb=0:{HUGE_PAGES}", 2),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0", 1),
    ],
)
def test_a_program_restarts_once_with_its_arguments(before, after, starts):
    environment = {**os.environ, HUGE_PAGES_VARIABLE: before}
    command = [sys.executable, "-c", SCRIPT, "two words", "--x=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "start\n" * starts + f"{after} ['two words', '--x=1']\n"
