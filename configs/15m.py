"""llama2.c's 15M model on TinyStories, with its training settings.

131,072 tokens a step (batch 128 × accumulation 4 × sequence 256); 15,191,712 parameters. llama2.c
reports a validation loss of 1.072, a few hours on four A100. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/15m.py
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
            vocab_size=32000,
            dim=288,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            context_length=256,
            multiple_of=32,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            path="data/tinystories32k",
            corpus="tinystories",
            batch_size=512,
            sequence_length=256,
        ),
        optimizer=OptimizerConfig(
            steps=100_000,
            learning_rate=5e-4,
            warmup_steps=1000,
            accumulation_steps=4,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/15m",
            eval_every=2000,
            eval_batches=100,
            save_every=1000,
        ),
    )
    return as_config_dict(config)
