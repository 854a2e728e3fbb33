"""Shakespeare's plays, a text that fits in a pocket: prepare.py shakespeare, then train.py

8,192 tokens a step; 3,049,920 parameters. Two CPU cores: about an hour. Measured are only the first
four minutes: a validation loss of 4.68 after 100 of the 1,500 steps.
"""

from typing import Any

from llama_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    as_config_dict,
)


def get_config() -> Any:
    """The run's settings; any can be overridden as --config.section.name=value."""
    config = Config(
        model=ModelConfig(
            vocab_size=2048,
            dim=192,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            context_length=256,
            multiple_of=32,
            dropout=0.2,
        ),
        data=DataConfig(
            path="data/shakespeare",
            corpus="shakespeare",
            batch_size=32,
            sequence_length=256,
        ),
        optimizer=OptimizerConfig(
            steps=1500,
            learning_rate=1e-3,
            min_learning_rate=1e-4,
            warmup_steps=100,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/shakespeare",
        ),
    )
    return as_config_dict(config)
