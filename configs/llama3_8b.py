"""Llama 3 8B: Meta's shape and peak learning rate (Dubey et al. 2024, table 3).

4,194,304 tokens per step (512 sequences × 8,192) for 15 T tokens; 8,030,261,248 parameters.
Meta used 1.3 million H100 hours; batch, warm-up and decay are those of configs/7b.py.
Parameters and moments take 96 GB in float32, sharded over the fsdp axis.
A microbatch has 32 sequences, and only the inputs of each block are kept for the backward pass.
The data need a vocabulary of 128,256 pieces, such as Llama 3's tokenizer.json:

    python plan.py --config configs/llama3_8b.py --target v5p-64
    python prepare.py TEXTS/ --tokenizer tokenizer.json --output data/tokens_llama3
    python train.py --config configs/llama3_8b.py --config.optimizer.accumulation_steps=…
"""

from typing import Any

from llama_jax.config import Config, MeshConfig, as_config_dict
from llama_jax.presets import llama2_optimizer, llama2_run, llama3_data, llama3_model


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama3_model(
            dim=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            multiple_of=1024,
            ffn_dim_multiplier=1.3,
        ),
        data=llama3_data(),
        optimizer=llama2_optimizer(steps=3_600_000, learning_rate=3.0e-4, min_learning_rate=3.0e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
        run=llama2_run(checkpoint_dir="ckpt/llama3_8b"),
    )
    return as_config_dict(config)
