"""Compare position encodings by training small models: does it matter how positions are encoded?

python study.py --corpus shakespeare                   # 10 to 30 minutes on two CPU cores
python study.py --corpus shakespeare --full            # larger models, for an accelerator
python study.py --corpus shakespeare --variant alibi --seed 2
python study.py --corpus shakespeare --as-published    # as the study that this one repeats

The same command goes on where it was stopped. The folder gets curves as CSV, tables and pictures;
docs/study.md has the results of the default scale, and how to read them.
"""

import argparse
import logging
import os
from pathlib import Path

from llama_jax.cli import main as cli
from llama_jax.errors import UsageError


def parser() -> cli.Parser:
    """Return the parser of the command's flags."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", default="shakespeare", help="corpus of prepare.py, or text file (shakespeare)")
    add("--out", help="folder of the study (study/, study-full/ or study-as-published/)")
    add("--full", action="store_true", help="larger models, longer runs, five seeds")
    add("--as-published", action="store_true", help="33M parameters, 100 epochs of 32 tokens")
    add("--variant", help="only this value of model.position (all)")
    seed_help = "only this seed, from 0; its learning rate is chosen on seed 0, first (all)"
    add("--seed", type=int, help=seed_help)
    return parser


def main(argv: list[str]) -> int:
    """Run the command and return its exit code.

    Raises:
      UsageError: for flags that exclude each other.
      UserError: for an unknown variant, seed or corpus, or a folder of something else.
    """
    flags = parser().parse_args(argv)
    if flags.full and flags.as_published:
        raise UsageError("--full and --as-published exclude each other; use one of them")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every file

    from llama_jax.cli.startup import use_compilation_cache
    from llama_jax.study.run import Study, run_study
    from llama_jax.study.settings import AS_PUBLISHED, DEFAULT, FULL, VARIANTS

    scale = FULL if flags.full else AS_PUBLISHED if flags.as_published else DEFAULT
    name = "study" if scale is DEFAULT else f"study-{scale.name}"
    study = Study(
        scale=scale,
        corpus=flags.corpus,
        folder=Path(flags.out or name).expanduser(),
        variants=VARIANTS if flags.variant is None else (flags.variant,),
        seeds=tuple(range(scale.seeds)) if flags.seed is None else (flags.seed,),
    )
    use_compilation_cache()
    return run_study(study)
