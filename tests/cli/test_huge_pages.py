"""A program starts itself again, once, with huge pages and the same words."""

import os
import subprocess
import sys

import pytest

from llama_jax.cli.startup import SETTING, VARIABLE

SCRIPT = f"""
import os, sys
from llama_jax.cli.startup import use_huge_pages
print("start", flush=True)
use_huge_pages()
print(os.environ.get({VARIABLE!r}), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
@pytest.mark.parametrize(
    ("before", "after", "starts"),
    [
        ("", SETTING, 2),
        ("glibc.malloc.perturb=0", f"glibc.malloc.perturb=0:{SETTING}", 2),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0", 1),
    ],
)
def test_it_starts_again_once_with_its_words(before, after, starts):
    environment = {**os.environ, VARIABLE: before}
    command = [sys.executable, "-c", SCRIPT, "two words", "--x=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "start\n" * starts + f"{after} ['two words', '--x=1']\n"
