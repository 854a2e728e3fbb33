"""Meta's Llama 2 70B: its shape, and its pretraining settings (Touvron et al. 2023, section 2.2).

4,194,304 tokens a step (1,024 sequences × 4,096) for 2 T tokens; 68,976,648,192 parameters.
Meta used 1,720,320 A100 hours and ended at a training loss of about 1.5 (not checked here).
Parameters and moments take 828 GB in float32, cut over the fsdp and tensor axis.
As set, 64 sequences are in flight, one a chip on 64 chips, and of each block its input is kept.
plan.py tells where that fits and what would fit elsewhere. Tokens come from prepare.py with
Llama 2's tokenizer.model:

    python plan.py --config configs/70b.py --target v5p-64
    python prepare.py TEXTS/ --tokenizer tokenizer.model --output data/tokens
    python train.py --config configs/70b.py --config.optimizer.accumulation_steps=…
"""

from typing import Any

from llama_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    as_config_dict,
)


def get_config() -> Any:
    """The run's settings; any can be overridden as --config.section.name=value."""
    config = Config(
        model=ModelConfig(
            vocab_size=32000,
            dim=8192,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            multiple_of=4096,
            ffn_dim_multiplier=1.3,
            context_length=4096,
            tied_embeddings=False,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            path="data/tokens",
            batch_size=1024,
            sequence_length=4096,
        ),
        optimizer=OptimizerConfig(
            steps=500_000,
            learning_rate=1.5e-4,
            min_learning_rate=1.5e-5,
            warmup_steps=2000,
            eps=1e-5,
            accumulation_steps=16,
        ),
        mesh=MeshConfig(
            data=1,
            fsdp=-1,
            tensor=8,
            sequence=True,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/70b",
            eval_every=1000,
            eval_batches=50,
            save_every=500,
            sample_tokens=0,
            remat="block",
        ),
    )
    return as_config_dict(config)
