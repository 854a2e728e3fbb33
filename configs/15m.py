"""llama2.c's 15M model on TinyStories, with its training settings.

131,072 tokens per step (batch 128 × accumulation 4 × sequence 256); 15,191,712 parameters. llama2.c
reports a validation loss of 1.072 after a few hours on four A100s. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/15m.py
"""

from typing import Any

from llama_jax.config import Config, OptimizerConfig, as_config_dict
from llama_jax.presets import llama2c_data, llama2c_model, llama2c_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2c_model(
            dim=288,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            context_length=256,
        ),
        data=llama2c_data(batch_size=512, sequence_length=256),
        optimizer=OptimizerConfig(
            steps=100_000,
            learning_rate=5e-4,
            warmup_steps=1000,
            accumulation_steps=4,
        ),
        run=llama2c_run(checkpoint_dir="ckpt/15m"),
    )
    return as_config_dict(config)
