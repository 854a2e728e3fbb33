"""Llama 3.2 1B: Meta's shape, tied and with a context of 131,072 by scaled positions.

4,194,304 tokens per step (512 sequences × 8,192) for 9 T tokens; 1,235,814,400 parameters.
Meta pruned it from Llama 3.1 8B and used 370 thousand H100 hours; the settings here, those of
configs/llama3_8b.py, are for training such a shape from the start.
Parameters and moments take 15 GB in float32, sharded over the fsdp axis.
A microbatch has 32 sequences, and only the inputs of each block are kept for the backward pass.
The data need a vocabulary of 128,256 pieces, such as Llama 3's tokenizer.json:

    python plan.py --config configs/llama32_1b.py --target v5e-8
    python prepare.py TEXTS/ --tokenizer tokenizer.json --output data/tokens_llama3
    python train.py --config configs/llama32_1b.py --config.optimizer.accumulation_steps=…
"""

from typing import Any

from llama_jax.config import Config, MeshConfig, RopeScaling, as_config_dict
from llama_jax.presets import llama2_optimizer, llama2_run, llama3_data, llama3_model


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama3_model(
            dim=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            ffn_dim_multiplier=1.5,
            context_length=131_072,
            rope_scaling=RopeScaling(kind="llama3", factor=32.0),
            tied_embeddings=True,
        ),
        data=llama3_data(),
        optimizer=llama2_optimizer(steps=2_150_000, learning_rate=3.0e-4, min_learning_rate=3.0e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
        run=llama2_run(checkpoint_dir="ckpt/llama32_1b"),
    )
    return as_config_dict(config)
