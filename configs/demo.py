"""A small Llama that learns to tell the embedded stories: python train.py

2,048 tokens a step; 869,504 parameters. Two CPU cores: about two minutes, to a validation loss of
0.22 and stories whose characters stay themselves.
"""

from typing import Any

from llama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from llama_jax.config_parsing import as_config_dict


def get_config() -> Any:
    """The run's settings; any can be overridden as --config.section.name=value."""
    config = Config(
        model=ModelConfig(
            vocab_size=1024,
            dim=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            context_length=256,
            multiple_of=32,
            init_std=0.06,  # larger than usual, for so small a model and so short a run
        ),
        data=DataConfig(
            path="data/stories",
            corpus="stories",
            batch_size=8,
            sequence_length=256,
        ),
        optimizer=OptimizerConfig(
            steps=900,
            learning_rate=3e-3,
            warmup_steps=50,
            weight_decay=0.1,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt",
            log_every=50,
            eval_every=300,
            eval_batches=10,
            save_every=300,
            sample_prompt="Once upon a time",
        ),
    )
    return as_config_dict(config)
