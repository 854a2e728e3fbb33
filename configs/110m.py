"""llama2.c's 110M model on TinyStories, with its training settings.

131,072 tokens per step (batch 16 × accumulation 8 × sequence 1024); 109,529,856 parameters.
llama2.c reports a validation loss of 0.760 after about a day on four A100s. It drops attention
weights too; so does this with --config.run.attention=xla, which on TPUs and GPUs is not the
default, since all of them are then held in memory. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/110m.py
"""

from typing import Any

from llama_jax.config import Config, OptimizerConfig, as_config_dict
from llama_jax.presets import llama2c_data, llama2c_model, llama2c_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2c_model(
            dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            context_length=1024,
            dropout=0.1,
        ),
        data=llama2c_data(batch_size=128, sequence_length=1024),
        optimizer=OptimizerConfig(
            steps=200_000,
            learning_rate=4e-4,
            warmup_steps=1000,
            accumulation_steps=8,
        ),
        run=llama2c_run(checkpoint_dir="ckpt/110m"),
    )
    return as_config_dict(config)
