"""Process settings made before a command runs: platform, huge pages, cache of compiled programs."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path


def use_compilation_cache() -> None:
    """Keep compiled programs in `$LLAMA_JAX_CACHE`, by default ~/.cache/llama_jax."""
    import jax

    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "llama_jax"
    folder = Path(os.environ.get("LLAMA_JAX_CACHE", default)).expanduser() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def skip_absent_tpu(devices: Path = Path("/dev")) -> None:
    """Choose the CPU on a machine without accelerators where libtpu is installed.

    plan.py needs libtpu on any machine. JAX would start it to look for TPUs, and libtpu then prints
    several lines of errors. With plugins for other accelerators the choice is left to JAX.
    """
    has_tpu = any(devices.glob("accel*")) or any(devices.glob("vfio/*"))
    plugins = "jax_plugins"  # where JAX looks for them: a namespace package and entry points
    has_plugins = importlib.util.find_spec(plugins) or importlib.metadata.entry_points(
        group=plugins
    )
    if not has_tpu and not has_plugins and importlib.util.find_spec("libtpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


# Huge pages for large arrays, on Linux.
#
# A training step on CPU takes hundreds of megabytes from the C library and gives them back. In
# pages
# of 4 KiB that is 140,000 page faults a step for the 15M model, a tenth of its time, and a quarter
# for the 260K model; decoding, which reads every weight for every token, is 15 % faster. glibc
# (2.35
# or later) asks for huge pages when told so before a program starts.

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Start this program again, once, with huge pages asked for; call it before anything else."""
    asked = os.environ.get(VARIABLE, "")
    if sys.platform != "linux" or not sys.executable or SETTING.partition("=")[0] in asked:
        return
    os.environ[VARIABLE] = ":".join(filter(None, [asked, SETTING]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
