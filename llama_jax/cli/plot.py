"""Draw the loss curve of a run as RUN/loss.png: llama-jax plot RUN"""

from pathlib import Path

from llama_jax.cli.main import Parser


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", nargs="?", default="ckpt", help="folder of a run")
    folder = Path(parser.parse_args(argv).run).expanduser()

    from llama_jax.training.plot import draw

    print(draw(folder))
