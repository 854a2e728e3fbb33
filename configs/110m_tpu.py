"""A 110M Llama shaped for TPUs: llama2.c's count of parameters in 6 heads of 128, not 12 of 64.

131,072 tokens a step (batch 16 × accumulation 8 × sequence 1024); 109,529,856 parameters. A TPU's
matrix unit multiplies tiles of 128 × 128 (256 × 256 since v6e) and its memory holds the last dim in
rows of 128, so products over heads of 64 fill half of either. Here every dim is a multiple of 128,
the vocabulary of 250 · 128 too, and of 256 but for the heads. How much it brings was not measured
here; tpuchat, a model of this size, ran nearly twice as fast when its heads doubled.

There is no dropout, because fused attention kernels drop no weights, and so a tenth of llama2.c's
steps: 24 tokens to a parameter. Needs Llama 2's tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/110m_tpu.py
"""

from typing import Any

from llama_jax.config import (
    Config,
    DataConfig,
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
            dim=768,
            num_layers=12,
            num_heads=6,
            num_kv_heads=6,
            context_length=1024,
            multiple_of=32,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            path="data/tinystories32k",
            corpus="tinystories",
            batch_size=128,
            sequence_length=1024,
        ),
        optimizer=OptimizerConfig(
            steps=20_000,
            learning_rate=4e-4,
            warmup_steps=1000,
            accumulation_steps=8,
        ),
        run=RunConfig(
            checkpoint_dir="ckpt/110m-tpu",
            eval_every=2000,
            eval_batches=100,
            save_every=1000,
        ),
    )
    return as_config_dict(config)
