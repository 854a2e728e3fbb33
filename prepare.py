"""Turn text into tokens to train on: python prepare.py my_texts/ --output data/mine"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("prepare")
