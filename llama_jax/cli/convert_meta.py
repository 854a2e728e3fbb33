"""Import Meta's Llama weights: `convert.py --from meta --to ckpt` under a name of its own."""

from llama_jax.cli import convert


def main(argv: list[str]) -> None:
    """Convert Meta's weights to a checkpoint; flags are those of `convert.py`."""
    convert.main(["--from", "meta", "--to", "ckpt", *argv])
