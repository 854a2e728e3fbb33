"""Serve models over HTTP: python serve.py --model ckpt/smollm2"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("serve")
