"""Settings and fixtures of all tests: eight simulated devices, quick compilation."""

import gc
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # "cuda,cpu" also runs what needs a GPU

from compilation import OPTIMIZATIONS, xla_flags

# Most of a test's time is compilation. So XLA optimizes little, here and in child processes, except
# in files marked `optimized`. "0" compiles everything as users do.
os.environ.setdefault(OPTIMIZATIONS, "1")
os.environ["XLA_FLAGS"] = xla_flags(devices=8)

import jax
import pytest
from tiny_model import TINY, make_model

from llama_jax.config import ModelConfig

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000, 20, 100)  # traces make many objects that live on
# A shell ignores Ctrl-C in background jobs, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FLAG = "jax_disable_most_optimizations"
QUICK = jax.config.read(FLAG)
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))  # for story_recognition


@pytest.fixture(scope="module", autouse=True)
def compiler(request):
    """Set how a file's programs are compiled, and drop those compiled otherwise before."""
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
    """The folder of real files that some tests read; without it they are skipped."""
    folder = Path(os.environ.get("LLAMA_JAX_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no test data; set LLAMA_JAX_TEST_DATA to its folder")
    return folder
