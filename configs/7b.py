"""Meta's Llama 2 7B: its shape, and its pretraining settings (Touvron et al. 2023, section 2.2).

4,194,304 tokens a step (1,024 sequences × 4,096) for 2 T tokens; 6,738,415,616 parameters.
Meta used 184,320 A100 hours and ended at a training loss of about 1.75 (not checked here).
Parameters and moments take 81 GB in float32, cut over the fsdp axis.
As set, 64 sequences are in flight, one a chip on 64 chips, and of each block its input is kept.
plan.py tells where that fits and what would fit elsewhere. Tokens come from prepare.py with
Llama 2's tokenizer.model:

    python plan.py --config configs/7b.py --target v5e-8
    python prepare.py TEXTS/ --tokenizer tokenizer.model --output data/tokens
    python train.py --config configs/7b.py --config.optimizer.accumulation_steps=…
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
            dim=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
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
            learning_rate=3.0e-4,
            min_learning_rate=3.0e-5,
            warmup_steps=2000,
            eps=1e-5,
            accumulation_steps=16,
        ),
        mesh=MeshConfig(
            data=1,
            fsdp=-1,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/7b",
            eval_every=1000,
            eval_batches=50,
            save_every=500,
            sample_tokens=0,
            remat="block",
        ),
    )
    return as_config_dict(config)
