"""What a step keeps in memory: the state once, one microbatch's activations, a chunk's logits."""

import functools

import jax
import pytest
from tiny_model import TINY

from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from llama_jax.data.loader import abstract_batch
from llama_jax.distributed.mesh import make_mesh
from llama_jax.model.parameters import count_parameters
from llama_jax.training.loss import CHUNK_TOKENS
from llama_jax.training.step import abstract_state, jit_train_step

pytestmark = [pytest.mark.optimized, pytest.mark.as_used]

MICROBATCH, T = 8, 24


@functools.cache
def memory(rows=MICROBATCH, length=T, accumulation=1, moments="float32", **model):
    """The compiler's account of a step, and the size of its state."""
    config = Config(
        model=ModelConfig(**TINY | {"context_length": length} | model),
        data=DataConfig(path="nowhere", batch_size=rows * accumulation, sequence_length=length),
        optimizer=OptimizerConfig(
            steps=10,
            learning_rate=1e-3,
            warmup_steps=0,
            accumulation_steps=accumulation,
            moments_dtype=moments,
        ),
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        lowered = jit_train_step(config, mesh).lower(state, abstract_batch(config))
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return compiled.memory_analysis(), size


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_new_state_takes_the_place_of_the_old_one(moments):
    found, state = memory(moments=moments)
    assert found.alias_size_in_bytes >= state
    assert found.output_size_in_bytes - found.alias_size_in_bytes < 4096  # only metrics are new


@pytest.mark.slow
def test_short_moments_take_half_and_are_never_wide_all_at_once():
    (wide, whole), (short, smaller) = memory(), memory(moments="bfloat16")
    parameters = count_parameters(ModelConfig(**TINY))
    assert whole - smaller == 2 * 2 * parameters
    assert short.temp_size_in_bytes - wide.temp_size_in_bytes < parameters


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_microbatches():
    four, sixteen = (memory(accumulation=n)[0].temp_size_in_bytes for n in (4, 16))
    tokens = 12 * MICROBATCH * T * 4  # bytes of a number for each token that the sixteen have more
    assert abs(sixteen - four) <= 4 * tokens
    parameters = 4 * count_parameters(ModelConfig(**TINY))
    assert four - memory()[0].temp_size_in_bytes < 2 * parameters  # the gradients' running sum


@pytest.mark.slow
def test_memory_does_not_grow_with_vocabulary_times_tokens():
    """Twice the tokens take more activations, as many with a large vocabulary as with a small."""
    small, large = 512, 8192
    assert 2 * CHUNK_TOKENS <= 64 * 32

    def added(vocabulary):
        shape = {"vocab_size": vocabulary, "num_layers": 1}
        once, twice = (memory(64, length, **shape)[0] for length in (32, 64))
        return twice.temp_size_in_bytes - once.temp_size_in_bytes

    logits = 64 * 32 * large * 4  # of the tokens that come on top
    assert abs(added(large) - added(small)) < 0.01 * logits
