"""Train a Llama: python train.py --config 110m --config.optimizer.learning_rate=3e-4

Without --config it trains the config demo. The same command resumes a run that was interrupted. On
several machines, start it on each of them with --distributed: see docs/pods.md.
docs/config.md lists every KEY of --config.KEY=VALUE with its type, default and meaning.
"""

import argparse
import contextlib
import logging
import os

from llama_jax.cli import main as cli
from llama_jax.cli.config_flags import read_config
from llama_jax.errors import UsageError
from llama_jax.files import progress

PROCESS_FLAGS = ("coordinator", "num_processes", "process_id", "timeout")


def parser() -> cli.Parser:
    """Return the parser of all flags but `--config.key=value`."""
    parser = cli.Parser(
        description=__doc__,
        usage="%(prog)s [--config FILE] [--config.KEY=VALUE ...] [--profile START:STOP]"
        " [--distributed ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default="demo",
        help="config of the run: a file, or the name of a shipped one (demo)",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace the steps after step START up to step STOP, such as 10:13",
    )
    add = parser.add_argument_group("several processes, on one machine or many").add_argument
    add(
        "--distributed",
        action="store_true",
        help="be one of several processes, which Slurm, Open MPI, GKE or Cloud TPU describe, or"
        " these flags:",
    )
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--num_processes", metavar="N", type=int, help="number of processes")
    add("--process_id", metavar="I", type=int, help="number of this process, from 0")
    add("--timeout", metavar="SECONDS", type=float, help="longest silence of a process (300)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    flags, words = parser().parse_known_args(argv)
    processes = {
        name: value for name in PROCESS_FLAGS if (value := getattr(flags, name)) is not None
    }
    if processes and not flags.distributed:
        raise UsageError(f"--{next(iter(processes))} needs --distributed; add it", page="pods.md")
    config = read_config(flags.config, words, fetch=True)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file

    with progress("importing JAX"):
        from llama_jax.cli.startup import use_compilation_cache
        from llama_jax.distributed.processes import joined
        from llama_jax.training.profiling import parse_window
        from llama_jax.training.run import fit

    window = None
    if flags.profile is not None:
        window = parse_window(flags.profile, config.optimizer.steps)
    use_compilation_cache()
    with joined(**processes) if flags.distributed else contextlib.nullcontext():
        return fit(config, window)
