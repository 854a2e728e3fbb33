"""Presets: settings that several config files share; a file then says only what is its own."""

from functools import partial

from llama_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig

_model = partial(ModelConfig, vocab_size=32_000, compute_dtype="bfloat16")
llama2c_model = partial(_model, multiple_of=32)  # with Llama 2's tokenizer
llama2c_data = partial(DataConfig, path="data/tinystories32k", corpus="tinystories")
llama2c_run = partial(RunConfig, eval_every=2000, eval_batches=100, save_every=1000)
llama2_model = partial(_model, context_length=4096, tied_embeddings=False)
llama3_model = partial(llama2_model, vocab_size=128_256, context_length=8192, rope_theta=5e5)
llama2_data = partial(DataConfig, batch_size=1024, sequence_length=4096)
llama3_data = partial(llama2_data, path="data/tokens_llama3", batch_size=512, sequence_length=8192)
llama2_optimizer = partial(  # Touvron et al. 2023, section 2.2
    OptimizerConfig, steps=500_000, warmup_steps=2000, eps=1e-5, accumulation_steps=16
)
llama2_run = partial(
    RunConfig, eval_every=1000, eval_batches=50, save_every=500, sample_tokens=0, remat="block"
)

# The model that fine-tuning starts from by default: SmolLM2-135M-Instruct, "smollm2" by name.
smollm2_model = partial(
    ModelConfig,
    vocab_size=49_152,
    dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    context_length=8192,
    hidden_dim=1536,
    rope_theta=100_000.0,
)

# Fine-tuning on examples that prepare.py packs.
sft_data = partial(
    DataConfig, path="data/sft", batch_size=8, sequence_length=512, packing="documents"
)
sft_run = partial(RunConfig, init_from="smollm2", eval_every=50, eval_epochs=True, save_every=50)
