"""Llama 2 70B with Meta's pretraining settings (Touvron et al. 2023, section 2.2).

4,194,304 tokens per step (1,024 sequences × 4,096) for 2 T tokens; 68,976,648,192 parameters.
Meta used 1,720,320 A100 hours and reached a training loss of about 1.5 (not reproduced here).
Parameters and moments take 828 GB in float32, sharded over the fsdp and tensor axes.
A microbatch has 64 sequences, one per chip on 64 chips, and only the inputs of each block are kept
for the backward pass. plan.py reports where that fits and which settings fit elsewhere.
The data need Llama 2's tokenizer.model:

    python plan.py --config configs/70b.py --target v5p-64
    python prepare.py TEXTS/ --tokenizer tokenizer.model --output data/tokens
    python train.py --config configs/70b.py --config.optimizer.accumulation_steps=…
"""

from typing import Any

from llama_jax.config import Config, MeshConfig, as_config_dict
from llama_jax.presets import llama2_data, llama2_model, llama2_optimizer, llama2_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2_model(
            dim=8192,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            multiple_of=4096,
            ffn_dim_multiplier=1.3,
        ),
        data=llama2_data(path="data/tokens"),
        optimizer=llama2_optimizer(learning_rate=1.5e-4, min_learning_rate=1.5e-5),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=8, sequence=True),
        run=llama2_run(checkpoint_dir="ckpt/70b"),
    )
    return as_config_dict(config)
