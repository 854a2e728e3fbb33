"""A small Llama on the embedded stories, the default of train.py.

2,560 tokens per step; 631,424 parameters. Two and a half minutes on two CPU cores, to a validation
loss of 0.16 and coherent stories:

    python train.py
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
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=ModelConfig(
            vocab_size=2048,
            dim=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            context_length=256,
            multiple_of=32,
            init_std=0.06,  # larger than usual, for so small a model and so short a run
        ),
        data=DataConfig(
            path="data/stories",
            corpus="stories",
            batch_size=16,
            sequence_length=160,
            packing="documents",
        ),
        optimizer=OptimizerConfig(
            steps=1300,
            learning_rate=6e-3,
            warmup_steps=50,
            weight_decay=0.1,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt",
            log_every=50,
            eval_every=400,
            eval_batches=10,
            save_every=400,
            sample_prompt="Once upon a time",
        ),
    )
    return as_config_dict(config)
