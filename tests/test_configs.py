"""Config files: published shapes and settings, and docstrings that agree with them."""

import importlib.util
import re
from pathlib import Path

import pytest

from llama_jax.config import Config
from llama_jax.config_parsing import parse
from llama_jax.model.parameters import count_parameters

FOLDER = Path(__file__).resolve().parents[1] / "configs"
NAMES = ("demo", "shakespeare", "260k", "15m", "42m", "110m", "110m_tpu", "7b", "13b", "70b")
NAMES += ("llama3_8b", "llama3_70b", "llama32_1b")
NAMES += ("sft", "sft_demo", "sft_lora", "sft_qlora", "dpo", "alpaca_7b_lora", "alpaca_7b_qlora")

# dim, layers, heads, kv heads, feed-forward, vocabulary, context, tied: llama2.c's and Meta's.
SHAPES = {
    "260k": (64, 5, 8, 4, 172, 512, 512, True),
    "15m": (288, 6, 6, 6, 768, 32000, 256, True),
    "42m": (512, 8, 8, 8, 1376, 32000, 1024, True),
    "110m": (768, 12, 12, 12, 2048, 32000, 1024, True),
    "110m_tpu": (768, 12, 6, 6, 2048, 32000, 1024, True),
    "7b": (4096, 32, 32, 32, 11008, 32000, 4096, False),
    "13b": (5120, 40, 40, 40, 13824, 32000, 4096, False),
    "70b": (8192, 80, 64, 8, 28672, 32000, 4096, False),
    "llama3_8b": (4096, 32, 32, 8, 14336, 128_256, 8192, False),
    "llama3_70b": (8192, 80, 64, 8, 28672, 128_256, 8192, False),
    "llama32_1b": (2048, 16, 32, 8, 8192, 128_256, 131_072, True),
}
PARAMETERS = {
    "260k": 260_032,
    "15m": 15_191_712,
    "42m": 41_689_600,
    "110m": 109_529_856,
    "110m_tpu": 109_529_856,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
}
# learning rate, steps, warm-up, weight decay, beta2, dropout, microbatch size, microbatches.
RECIPES = {
    "260k": (1e-3, 100_000, 1000, 0.01, 0.99, 0.05, 128, 1),
    "15m": (5e-4, 100_000, 1000, 0.1, 0.95, 0.0, 128, 4),
    "110m": (4e-4, 200_000, 1000, 0.1, 0.95, 0.1, 16, 8),
}


def load(name):
    """Return a file's docstring and its parsed config."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__doc__, parse(Config, module.get_config())


def test_every_config_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_numbers_match_the_config(name):
    text, config = load(name)
    assert f"{config.tokens_per_step:,} tokens per step" in text
    count = count_parameters(config.model)
    short = f"{count / 1e6:.1f} M parameters"
    assert f"{count:,} parameters" in text or short in text
    batch = re.search(r"\(batch (\d+) × accumulation (\d+) × sequence (\d+)\)", text)
    if batch:
        found = config.microbatch_size, config.optimizer.accumulation_steps
        assert tuple(map(int, batch.groups())) == (*found, config.data.sequence_length)
    if name in PARAMETERS:
        assert f"--config configs/{name}.py" in text


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_match_published_models(name):
    model = load(name)[1].model
    shape = (model.dim, model.num_layers, model.num_heads, model.num_kv_heads, model.ffn_dim)
    shape += (model.vocab_size, model.context_length, model.tied_embeddings)
    assert shape == SHAPES[name]
    assert count_parameters(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_optimizer_settings_match_llama2c(name):
    _, config = load(name)
    settings = config.optimizer
    found = (settings.learning_rate, settings.steps, settings.warmup_steps, settings.weight_decay)
    found += (settings.beta2, config.model.dropout)
    found += (config.microbatch_size, settings.accumulation_steps)
    assert found == RECIPES[name]
    assert (settings.beta1, settings.eps, settings.clip_norm) == (0.9, 1e-8, 1.0)
    assert settings.min_learning_rate == 0.0


@pytest.mark.parametrize("name", [name for name in SHAPES if PARAMETERS[name] > 1e9])
def test_docstring_states_memory_of_parameters_and_moments(name):
    text, config = load(name)
    assert f"take {3 * 4 * count_parameters(config.model) / 1e9:.0f} GB in float32" in text
    assert "hours" in text and ("loss" in text or name.startswith("llama3"))


def test_110m_tpu_fills_tiles_and_supports_fused_attention():
    model = load("110m_tpu")[1].model
    assert model.head_size == 128
    for size in (model.dim, model.num_heads * model.head_size, model.ffn_dim, model.vocab_size):
        assert size % 128 == 0
    assert abs(count_parameters(model) / PARAMETERS["110m"] - 1) < 0.02
    assert (model.compute_dtype, model.dropout) == ("bfloat16", 0.0)
