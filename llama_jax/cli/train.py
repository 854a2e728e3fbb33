"""Train a Llama: python train.py --config configs/110m.py --config.optimizer.learning_rate=3e-4

Without --config it trains configs/demo.py. The same command resumes where it stopped. On several
machines it runs on each of them, with --distributed: see docs/pods.md.
"""

import argparse
import contextlib
import logging
import os

from llama_jax.cli import main as cli
from llama_jax.cli.config_flags import read_config
from llama_jax.errors import UsageError

BY_HAND = ("coordinator", "num_processes", "process_id", "timeout")


def parser() -> cli.Parser:
    """The flags beside the config's."""
    parser = cli.Parser(
        description=__doc__,
        usage="%(prog)s [--config FILE] [--config.KEY=VALUE ...] [--profile START:STOP]"
        " [--distributed ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace the steps from when START are made to when STOP are, such as 10:13",
    )
    add = parser.add_argument_group("several processes, on one machine or many").add_argument
    add(
        "--distributed",
        action="store_true",
        help="be one of the processes that Slurm, Open MPI, GKE, Cloud TPU or these flags name:",
    )
    add("--coordinator", metavar="HOST:PORT", help="where process 0 waits for the others")
    add("--num_processes", metavar="N", type=int, help="how many there are")
    add("--process_id", metavar="I", type=int, help="which one this is, from 0")
    add("--timeout", metavar="SECONDS", type=float, help="how long the others may be silent (300)")
    return parser


def main(argv: list[str]) -> int:
    """Flags in, a run out."""
    options, words = parser().parse_known_args(argv)
    given = {name: value for name in BY_HAND if (value := getattr(options, name)) is not None}
    if given and not options.distributed:
        raise UsageError(f"--{next(iter(given))} needs --distributed")
    config = read_config(words, default=str(cli.CONFIGS / "demo.py"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every file

    from llama_jax.cli.startup import use_compilation_cache
    from llama_jax.distributed.processes import joined
    from llama_jax.training.profiling import parse_window
    from llama_jax.training.run import fit

    asked = options.profile
    profile = None if asked is None else parse_window(asked, config.optimizer.steps)
    use_compilation_cache()
    with joined(**given) if options.distributed else contextlib.nullcontext():
        return fit(config, profile)
