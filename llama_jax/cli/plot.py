"""Draw the loss curve of a run as RUN/loss.png, or compare runs: llama-jax plot RUN [RUN ...]

The picture of one run is also drawn while it trains, at validations and checkpoints. Several runs
share a picture, in which the legend names the best validation loss of each.
"""

from pathlib import Path

from llama_jax.cli.main import Parser
from llama_jax.errors import UsageError

COMPARISON = "comparison.png"


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs (ckpt)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="",
        help=f".png, .svg or .pdf for several runs, replaced if it exists ({COMPARISON})",
    )
    flags = parser.parse_args(argv)
    folders = [Path(run).expanduser() for run in flags.runs or ["ckpt"]]

    from llama_jax.training.plot import compare, draw

    if len(folders) > 1:
        print(compare(folders, Path(flags.output or COMPARISON).expanduser()))
        return
    if flags.output:
        raise UsageError("--output is for several runs; leave it out, or name more runs")
    print(draw(folders[0]))
