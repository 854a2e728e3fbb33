"""Llama 2 13B with Meta's pretraining settings (Touvron et al. 2023, section 2.2).

4,194,304 tokens per step (1,024 sequences × 4,096) for 2 T tokens; 13,015,864,320 parameters.
Meta used 368,640 A100 hours and reached a training loss of about 1.67 (not reproduced here).
Parameters and moments take 156 GB in float32, sharded over the fsdp axis.
A microbatch has 64 sequences, one per chip on 64 chips, and only the inputs of each block are kept
for the backward pass. plan.py reports where that fits and which settings fit elsewhere.
The data need Llama 2's tokenizer.model:

    python plan.py --config configs/13b.py --target v6e-8
    python prepare.py TEXTS/ --tokenizer tokenizer.model --output data/tokens
    python train.py --config configs/13b.py --config.optimizer.accumulation_steps=…
"""

from typing import Any

from llama_jax.config import Config, MeshConfig, as_config_dict
from llama_jax.presets import llama2_data, llama2_model, llama2_optimizer, llama2_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2_model(dim=5120, num_layers=40, num_heads=40, num_kv_heads=40),
        data=llama2_data(path="data/tokens"),
        optimizer=llama2_optimizer(learning_rate=3.0e-4, min_learning_rate=3.0e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
        run=llama2_run(checkpoint_dir="ckpt/13b"),
    )
    return as_config_dict(config)
