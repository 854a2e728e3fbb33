"""Direct preference optimisation of SmolLM2-135M-Instruct by LoRA (Rafailov et al. 2023).

4,096 tokens per step, packed pairs of a chosen and a rejected answer; 134,515,008 parameters. The
reference is the same model without its adapters, so that no copy is kept. The loss begins at 0.693;
rewards, their margin and the accuracy are reported:

    python prepare.py preferences.json --tokenizer smollm2 --output data/dpo
    python train.py --config configs/dpo.py --config.run.init_from=smollm2
"""

from typing import Any

from llama_jax.config import Config, DpoConfig, LoraConfig, OptimizerConfig, as_config_dict
from llama_jax.presets import sft_data, sft_run, smollm2_model


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=smollm2_model(),
        data=sft_data(path="data/dpo"),
        optimizer=OptimizerConfig(
            steps=300,
            learning_rate=5e-5,
            warmup_steps=10,
            weight_decay=0.0,
            beta2=0.999,
            loss="dpo",
        ),
        run=sft_run(checkpoint_dir="ckpt/dpo"),
        lora=LoraConfig(rank=16, alpha=32.0),
        dpo=DpoConfig(beta=0.1),
    )
    return as_config_dict(config)
