"""llama2.c's 42M shape on TinyStories.

131,072 tokens a step (batch 32 × accumulation 4 × sequence 1024); 41,689,600 parameters. Its
training settings were not published; these lie between those of the 15M and the 110M. llama2.c
reports a validation loss of 0.847, a few hours on four A100. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/42m.py
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
            dim=512,
            num_layers=8,
            num_heads=8,
            num_kv_heads=8,
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
            steps=100_000,
            learning_rate=5e-4,
            warmup_steps=1000,
            accumulation_steps=4,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/42m",
            eval_every=2000,
            eval_batches=100,
            save_every=1000,
        ),
    )
    return as_config_dict(config)
