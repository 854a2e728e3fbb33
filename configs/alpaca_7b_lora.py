"""Llama 2 7B on the 52,002 instructions of Stanford Alpaca by LoRA, in Alpaca's own format.

65,536 tokens per step (batch 4 × accumulation 32 × sequence 512), the batch of Taori et al. 2023,
in which examples are packed; 6,738,415,616 parameters. The frozen weights take 13.5 GB in bfloat16.
litgpt reports a validation loss of 0.802 on 2,000 of these examples (prompts not masked).

    python convert_meta.py --input llama-2-7b --output ckpt/llama2-7b
    python prepare.py alpaca_data.json --chat alpaca --tokenizer ckpt/llama2-7b --output data/alpaca
    python train.py --config configs/alpaca_7b_lora.py
"""

from typing import Any

from llama_jax.config import Config, LoraConfig, OptimizerConfig, as_config_dict
from llama_jax.presets import llama2_model, sft_data, sft_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2_model(dim=4096, num_layers=32, num_heads=32, num_kv_heads=32),
        data=sft_data(path="data/alpaca", batch_size=128),
        optimizer=OptimizerConfig(
            steps=320,
            learning_rate=2e-4,
            warmup_steps=10,
            weight_decay=0.0,
            beta2=0.999,
            accumulation_steps=32,
        ),
        run=sft_run(
            checkpoint_dir="ckpt/alpaca_7b_lora", init_from="ckpt/llama2-7b", remat="block"
        ),
        lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
    )
    return as_config_dict(config)
