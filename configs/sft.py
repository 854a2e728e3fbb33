"""Supervised fine-tuning of all weights of SmolLM2-135M-Instruct, or of another checkpoint.

4,096 tokens per step, packed examples; 134,515,008 parameters, 1.6 GB with their moments. Only the
assistant's tokens and the end of each answer are trained on. The model's settings come from the
checkpoint, so that any other takes its place:

    python prepare.py dialogues.json --tokenizer smollm2 --output data/sft
    python train.py --config configs/sft.py --config.run.init_from=smollm2
"""

from typing import Any

from llama_jax.config import Config, OptimizerConfig, as_config_dict
from llama_jax.presets import sft_data, sft_run, smollm2_model


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=smollm2_model(),
        data=sft_data(),
        optimizer=OptimizerConfig(
            steps=300, learning_rate=2e-5, warmup_steps=10, weight_decay=0.0, beta2=0.999
        ),
        run=sft_run(checkpoint_dir="ckpt/sft"),
    )
    return as_config_dict(config)
