"""Train a Llama: python train.py --config configs/110m.py --config.optimizer.learning_rate=3e-4

Without --config it trains configs/demo.py. The same command resumes where it stopped.
"""

import logging
import os
from pathlib import Path

from llama_jax import cli
from llama_jax.huge_pages import use_huge_pages


def main(argv: list[str]) -> int:
    """Flags in, a run out."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    demo = str(Path(__file__).parent / "configs" / "demo.py")
    tree = cli.config_from_flags(argv, default=demo)

    from llama_jax.config import Config
    from llama_jax.config_parsing import parse

    config = parse(Config, tree)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every file

    from llama_jax.compilation_cache import use_compilation_cache
    from llama_jax.training import fit

    use_compilation_cache()
    return fit(config)


if __name__ == "__main__":
    use_huge_pages()
    cli.run(main)
