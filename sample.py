"""Generate text with a Llama: python sample.py --ckpt ckpt/ --top_p 0.9"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("sample")
