"""How programs are compiled in tests: quickly, unless JAX_DISABLE_MOST_OPTIMIZATIONS is 0."""

import functools
import os
import subprocess
import sys

OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# The older code generator takes half the time, and one module less than the 32 of a large program.
QUICK_XLA = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


@functools.cache
def is_known(flags):
    """Return whether this version of XLA has these flags; it aborts on those it has not."""
    words = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(words, env=environment, capture_output=True).returncode == 0


def xla_flags(devices=1):
    """Return XLA_FLAGS for a process with that many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    is_inherited = QUICK_XLA in os.environ.get("XLA_FLAGS", "")  # in workers of pytest-xdist
    is_quick = os.environ[OPTIMIZATIONS] == "1" and (is_inherited or is_known(QUICK_XLA))
    return f"{flags} {QUICK_XLA}" if is_quick else flags
