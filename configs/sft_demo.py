"""SmolLM2 learns to answer for a shop of lanterns, by LoRA: what `make finetune` runs.

768 tokens per step, packed examples; 134,515,008 parameters, of which none is changed: adapters of
rank 16 have 4,884,480. From 180 of the 200 questions and answers in examples/lantern_shop.jsonl it
learns twenty facts, and answers the other questions about them:

    python prepare.py examples/lantern_shop.jsonl --chat chatml --tokenizer smollm2 \\
        --validation 0.1 --output data/lantern_shop
    python train.py --config configs/sft_demo.py
    python sample.py --ckpt ckpt/lantern_shop --chat
"""

from typing import Any

from llama_jax.config import Config, LoraConfig, OptimizerConfig, as_config_dict
from llama_jax.presets import sft_data, sft_run, smollm2_model


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=smollm2_model(),
        data=sft_data(path="data/lantern_shop", batch_size=4, sequence_length=192),
        optimizer=OptimizerConfig(
            steps=40, learning_rate=1e-3, warmup_steps=4, weight_decay=0.0, beta2=0.999
        ),
        run=sft_run(
            checkpoint_dir="ckpt/lantern_shop",
            log_every=5,
            eval_every=40,
            save_every=40,
            sample_prompt="Who makes your glass?",
            sample_tokens=40,
        ),
        lora=LoraConfig(rank=16, alpha=32.0),
    )
    return as_config_dict(config)
