"""What all tests share: eight pretend devices, how programs are compiled, a tiny model, data."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # "cuda,cpu" also runs what needs a GPU
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most of a test's time goes into compiling: here and in children that is done quickly, but for
# files marked `optimized`. "0" compiles everything as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from tiny_model import TINY, make_model

from llama_jax.config import ModelConfig

jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell ignores Ctrl-C for what runs in its background, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FLAG = "jax_disable_most_optimizations"
QUICK = jax.config.read(FLAG)
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))  # for story_recognition


@pytest.fixture(scope="module", autouse=True)
def compiler(request):
    """Compiles a file's programs as it wants; none is left from a file that wanted otherwise."""
    quick = QUICK and request.node.get_closest_marker("optimized") is None
    if quick != jax.config.read(FLAG):
        jax.clear_caches()
        jax.config.update(FLAG, quick)


@pytest.fixture(scope="session")
def tiny_config():
    return ModelConfig(**TINY)


@pytest.fixture(scope="session")
def tiny_model():
    return make_model()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real files that some tests read; absent, they are skipped."""
    folder = Path(os.environ.get("LLAMA_JAX_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no test data; set LLAMA_JAX_TEST_DATA to their folder")
    return folder
