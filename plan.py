"""Predict whether a run fits: python plan.py --config configs/7b.py --target v5e-8"""

from llama_jax.cli.main import run_command

if __name__ == "__main__":
    run_command("plan")
