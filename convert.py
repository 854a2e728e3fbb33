"""Convert a Llama between formats: python convert.py --input ckpt/ --to hf --output my-llama"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("convert")
