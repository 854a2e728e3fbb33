"""Draw the loss picture of a run, RUN/loss.png: llama-jax plot RUN"""

from pathlib import Path

from llama_jax.cli.main import Parser
from llama_jax.training.plot import draw


def main(argv: list[str]) -> None:
    """Draw the run that the command line names."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", nargs="?", default="ckpt", help="folder of a run")
    print(draw(Path(parser.parse_args(argv).run).expanduser()))
