"""llama2.c's 110M model on TinyStories, with its training settings.

131,072 tokens a step (batch 16 × accumulation 8 × sequence 1024); 109,529,856 parameters. llama2.c
reports a validation loss of 0.760, about a day on four A100. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/110m.py
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
            dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            context_length=1024,
            multiple_of=32,
            dropout=0.1,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            path="data/tinystories32k",
            corpus="tinystories",
            batch_size=128,
            sequence_length=1024,
        ),
        optimizer=OptimizerConfig(
            steps=200_000,
            learning_rate=4e-4,
            warmup_steps=1000,
            accumulation_steps=8,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/110m",
            eval_every=2000,
            eval_batches=100,
            save_every=1000,
        ),
    )
    return as_config_dict(config)
