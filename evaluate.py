"""Measure how good a model is: python evaluate.py --ckpt ckpt/ --text held_out.txt"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("evaluate")
