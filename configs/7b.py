"""Llama 2 7B with Meta's pretraining settings (Touvron et al. 2023, section 2.2).

4,194,304 tokens per step (1,024 sequences × 4,096) for 2 T tokens; 6,738,415,616 parameters.
Meta used 184,320 A100 hours and reached a training loss of about 1.75 (not reproduced here).
Parameters and moments take 81 GB in float32, sharded over the fsdp axis.
A microbatch has 64 sequences, one per chip on 64 chips, and only the inputs of each block are kept
for the backward pass. plan.py reports where that fits and which settings fit elsewhere.
The data need Llama 2's tokenizer.model:

    python plan.py --config configs/7b.py --target v5e-8
    python prepare.py TEXTS/ --tokenizer tokenizer.model --output data/tokens
    python train.py --config configs/7b.py --config.optimizer.accumulation_steps=…
"""

from typing import Any

from llama_jax.config import Config, MeshConfig, as_config_dict
from llama_jax.presets import llama2_data, llama2_model, llama2_optimizer, llama2_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2_model(dim=4096, num_layers=32, num_heads=32, num_kv_heads=32),
        data=llama2_data(path="data/tokens"),
        optimizer=llama2_optimizer(learning_rate=3.0e-4, min_learning_rate=3.0e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
        run=llama2_run(checkpoint_dir="ckpt/7b"),
    )
    return as_config_dict(config)
