"""What the tests share: eight pretend devices, a tiny model no two of whose sizes agree, data."""

import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # "cuda,cpu" also runs what needs a GPU
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Most of a test's time goes into compiling: here and in children that is done quickly, but for
# files marked `optimized`. "0" compiles everything as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ModelConfig
from llama_jax.model import abstract

jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell ignores Ctrl-C for what runs in its background, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FLAG = "jax_disable_most_optimizations"
QUICK = jax.config.read(FLAG)
REPOSITORY = Path(__file__).resolve().parents[1]
TINY = {"vocab_size": 53, "dim": 24, "num_heads": 6, "num_kv_heads": 2, "hidden_dim": 40}
TINY |= {"num_layers": 3, "context_length": 32}


def parameters(model):
    """The parameters by the names that `reference` uses; those of blocks have a leading L."""
    attention, ffn = model.blocks.attention, model.blocks.ffn
    named = {name: getattr(attention, name).kernel for name in ("wq", "wk", "wv", "wo")}
    named |= {name: getattr(ffn, name).kernel for name in ("gate", "up", "down")}
    named |= {name: getattr(model.blocks, name).scale for name in ("attention_norm", "ffn_norm")}
    named |= {"embedding": model.embedding, "norm": model.norm.scale}
    return named if model.config.tied_embeddings else named | {"output": model.output}


def plain(model):
    """The parameters as the plain arrays that `reference` takes."""
    return {name: np.asarray(param[...]) for name, param in parameters(model).items()}


def make_model(weights=None, **changes):
    """A tiny model with given weights, or with some large enough that every part matters."""
    model = abstract(ModelConfig(**TINY | changes))
    random = np.random.default_rng(0)
    for name, param in parameters(model).items():
        noise = 0.15 * random.standard_normal(param.shape, np.float32)
        param.set_value(jnp.asarray(weights[name] if weights else noise + ("norm" in name)))
    return model


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
