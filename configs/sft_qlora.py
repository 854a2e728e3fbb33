"""Supervised fine-tuning of SmolLM2-135M-Instruct by QLoRA, or of another checkpoint.

4,096 tokens per step, packed examples; 134,515,008 parameters. As configs/sft_lora.py, with the
frozen matrices of the blocks in NF4 (Dettmers et al. 2023), half a byte a parameter: slower, for
models that do not fit otherwise:

    python train.py --config configs/sft_qlora.py --config.run.init_from=ckpt/llama2-7b
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
        run=sft_run(checkpoint_dir="ckpt/sft_qlora", remat="block"),
        lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05, base="nf4", double_quantization=True),
    )
    return as_config_dict(config)
