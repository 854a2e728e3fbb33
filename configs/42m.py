"""The shape of llama2.c's 42M model on TinyStories.

131,072 tokens per step (batch 32 × accumulation 4 × sequence 1024); 41,689,600 parameters. Its
training settings are not published; these lie between those of the 15M and the 110M model. llama2.c
reports a validation loss of 0.847 after a few hours on four A100s. It drops attention weights too;
so does this with --config.run.attention=xla, which on TPUs and GPUs is not the default, since all
of them are then held in memory. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/42m.py
"""

from typing import Any

from llama_jax.config import Config, OptimizerConfig, as_config_dict
from llama_jax.presets import llama2c_data, llama2c_model, llama2c_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2c_model(
            dim=512,
            num_layers=8,
            num_heads=8,
            num_kv_heads=8,
            context_length=1024,
            dropout=0.1,
        ),
        data=llama2c_data(batch_size=128, sequence_length=1024),
        optimizer=OptimizerConfig(
            steps=100_000,
            learning_rate=5e-4,
            warmup_steps=1000,
            accumulation_steps=4,
        ),
        run=llama2c_run(checkpoint_dir="ckpt/42m"),
    )
    return as_config_dict(config)
