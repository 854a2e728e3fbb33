"""Supervised fine-tuning of SmolLM2-135M-Instruct by LoRA, or of another checkpoint.

4,096 tokens per step, packed examples; 134,515,008 parameters, of which none is changed: adapters
of rank 16 on every linear layer have 4,884,480, 3.6 %. A checkpoint of them takes 59 MB with their
moments. The model's settings come from the checkpoint, so that any other takes its place:

    python prepare.py dialogues.json --tokenizer smollm2 --output data/sft
    python train.py --config configs/sft_lora.py --config.run.init_from=smollm2
    python sample.py --ckpt ckpt/sft_lora --chat
"""

from typing import Any

from llama_jax.config import Config, LoraConfig, OptimizerConfig, as_config_dict
from llama_jax.presets import sft_data, sft_run, smollm2_model


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=smollm2_model(),
        data=sft_data(),
        optimizer=OptimizerConfig(
            steps=300, learning_rate=2e-4, warmup_steps=10, weight_decay=0.0, beta2=0.999
        ),
        run=sft_run(checkpoint_dir="ckpt/sft_lora"),
        lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
    )
    return as_config_dict(config)
