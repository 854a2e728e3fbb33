"""Process settings made before a command runs: platform, huge pages, cache of compiled programs."""

import errno
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from llama_jax.errors import UserError, format_line
from llama_jax.files import CACHE_VARIABLE, cache_folder


def use_compilation_cache() -> None:
    """Keep compiled programs in the cache folder.

    Where that cannot be written, as without a home directory, there is no cache, but a line.
    """
    import jax

    try:
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, UserError) as error:
        why = str(error)
        if isinstance(error, OSError):
            advice = f"set {CACHE_VARIABLE} to a folder"
            why = f"{error.filename} cannot be written ({error.strerror}); {advice}"
        # Not `warn`: it asks JAX for the process, which may not have joined the others yet.
        line = format_line(f"compiled programs are not kept: {why}")
        print(f"warning: {line}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


HUGE_PAGES_VARIABLE, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Restart this process once, on Linux, with huge pages enabled in the C library.

    A training step on CPU allocates and frees hundreds of megabytes. With pages of 4 KiB that is
    140,000 page faults a step for the 15M model, a tenth of its time (a quarter for the 260K
    model). Decoding is 15 % faster. glibc 2.35 and later read the setting when a process starts.
    """
    tunables = os.environ.get(HUGE_PAGES_VARIABLE, "")
    is_set = HUGE_PAGES.partition("=")[0] in tunables
    if sys.platform != "linux" or not sys.executable or is_set:
        return
    os.environ[HUGE_PAGES_VARIABLE] = ":".join(filter(None, [tunables, HUGE_PAGES]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# By purpose; XLA leaves both off. `benchmarks/roofline.py --flags` measures what they change.
GPU_FLAGS = {
    # The decode loop is launched once as a graph, and not each kernel of each token by the host.
    "decoding": "--xla_gpu_enable_command_buffer=+WHILE",
    # Collectives of sharded parameters run beside computation.
    "training": "--xla_gpu_enable_latency_hiding_scheduler=true",
}


def use_gpu_flags(
    purpose: str, is_distributed: bool = False, gpus: Path = Path("/proc/driver/nvidia/gpus")
) -> None:
    """Set the flag of XLA for a purpose on a machine with NVIDIA GPUs, and say so on stderr.

    One in XLA_FLAGS stays as it is, and nothing is set if JAX_PLATFORMS leaves GPUs out.

    Args:
      purpose: a key of `GPU_FLAGS`; for "training" there must be several GPUs.
      is_distributed: whether other machines have some of them.
      gpus: where their driver lists them.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & {*platforms.split(",")}:
        return
    count, flag = len(list(gpus.glob("*"))), GPU_FLAGS[purpose]
    least = 2 if purpose == "training" and not is_distributed else 1
    flags = os.environ.get("XLA_FLAGS", "")
    if count >= least and flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
        print(f"XLA_FLAGS has {flag}, for {purpose} on GPUs", file=sys.stderr)


def has_tpu(devices: Path = Path("/dev")) -> bool:
    """Return whether this machine has a TPU, whatever JAX says."""
    return any(devices.glob("accel*")) or any(devices.glob("vfio/*"))


def skip_absent_tpu(devices: Path = Path("/dev")) -> None:
    """Choose the CPU on a machine without accelerators where libtpu is installed.

    plan.py needs libtpu on any machine. JAX would start it to look for TPUs, and libtpu then prints
    several lines of errors. With plugins for other accelerators the choice is left to JAX.
    """
    if "JAX_PLATFORMS" in os.environ or not importlib.util.find_spec("libtpu"):
        return
    plugins = "jax_plugins"  # where JAX looks for them: a namespace package and entry points
    if not (
        has_tpu(devices)
        or importlib.util.find_spec(plugins)
        or importlib.metadata.entry_points(group=plugins)
    ):
        os.environ["JAX_PLATFORMS"] = "cpu"


def absent_platform_message(error: Exception) -> str:
    """Return the message for `JAX_PLATFORMS` naming what is absent, else an empty string."""
    named = os.environ.get("JAX_PLATFORMS")
    frames = traceback.extract_tb(error.__traceback__)
    if not (named and frames and Path(frames[-1].filename).name == "xla_bridge.py"):
        return ""
    import jax

    del os.environ["JAX_PLATFORMS"]
    skip_absent_tpu()  # it would print lines of its own
    try:
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))
        available = jax.devices()[0].platform
    except Exception:
        available = "cpu"
    return (
        f"JAX_PLATFORMS={named} names a device that cannot be used here; expected {available}:"
        " change the variable or unset it"
    )
