"""llama2.c's 110M model with heads for TPUs: 6 of width 128 instead of 12 of width 64.

131,072 tokens per step (batch 16 × accumulation 8 × sequence 1024); 109,529,856 parameters. A TPU's
matrix unit multiplies tiles of 128 × 128 (256 × 256 from v6e on) and its memory pads the last
dimension to 128, so heads of width 64 use half of either. Here every dimension is a multiple of
128. The speedup was not measured; tpuchat, a model of this size, ran nearly twice as fast with
heads twice as wide.

No dropout, and a tenth of llama2.c's steps: 24 tokens per parameter. Needs Llama 2's
tokenizer.model:

    python prepare.py tinystories --tokenizer tokenizer.model --output data/tinystories32k
    python train.py --config configs/110m_tpu.py
"""

from typing import Any

from llama_jax.config import Config, OptimizerConfig, as_config_dict
from llama_jax.presets import llama2c_data, llama2c_model, llama2c_run


def get_config() -> Any:
    """Return the run's settings; override any with --config.section.name=value."""
    config = Config(
        model=llama2c_model(
            dim=768,
            num_layers=12,
            num_heads=6,
            num_kv_heads=6,
            context_length=1024,
        ),
        data=llama2c_data(batch_size=128, sequence_length=1024),
        optimizer=OptimizerConfig(
            steps=20_000,
            learning_rate=4e-4,
            warmup_steps=1000,
            accumulation_steps=8,
        ),
        run=llama2c_run(checkpoint_dir="ckpt/110m-tpu"),
    )
    return as_config_dict(config)
