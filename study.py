"""Compare position encodings: python study.py --corpus shakespeare"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("study")
