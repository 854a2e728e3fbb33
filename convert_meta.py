"""Import Meta's weights: python convert_meta.py --input llama-2-7b/ --output ckpt/llama-2-7b"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("convert-meta")
