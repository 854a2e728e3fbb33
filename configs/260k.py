"""llama2.c's smallest model on TinyStories, with its training settings.

65,536 tokens per step (128 sequences × 512); 260,032 parameters. llama2.c reports a validation loss
of 1.297 after 100,000 steps, ten minutes on one A100. Needs a vocabulary of 512:

    python prepare.py tinystories --vocab_size 512 --output data/tinystories512
    python train.py --config configs/260k.py
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
            vocab_size=512,
            dim=64,
            num_layers=5,
            num_heads=8,
            num_kv_heads=4,
            context_length=512,
            multiple_of=4,
            dropout=0.05,
        ),
        data=DataConfig(
            path="data/tinystories512",
            corpus="tinystories",
            batch_size=128,
            sequence_length=512,
        ),
        optimizer=OptimizerConfig(
            steps=100_000,
            learning_rate=1e-3,
            warmup_steps=1000,
            beta2=0.99,
            weight_decay=0.01,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/260k",
            eval_every=2000,
            eval_batches=100,
            save_every=2000,
        ),
    )
    return as_config_dict(config)
