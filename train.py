"""Train a Llama: python train.py --config configs/110m.py"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("train")
