"""Learn whether a run fits: python plan.py --config configs/7b.py --target v5e-8

The real train step is compiled for TPUs that are not here, which takes a minute or two and the
extra `pip install '.[plan]'`; --fast only estimates, at once. GPUs are always estimated.
"""

import os
from typing import Any

from llama_jax import cli


def flags_of(argv: list[str]) -> tuple[Any, list[str]]:
    """What the command line asks for, and its words about the config."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="", help="such as v5e-8, v5p-64, v5e:4x4, H200-8")
    parser.add_argument("--fast", action="store_true", help="estimate only, without the compiler")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    """Flags in, a report out."""
    flags, words = flags_of(argv)
    tree = cli.config_from_flags(words, default="configs/demo.py")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from llama_jax.config import Config
    from llama_jax.config_parsing import parse
    from llama_jax.planning.report import training_report
    from llama_jax.planning.targets import parse_target
    from llama_jax.planning.training_plan import plan_training

    config, target = parse(Config, tree), parse_target(flags.target)
    print(training_report(plan_training(config, target, compile_it=not flags.fast)))
    return 0


if __name__ == "__main__":
    cli.run(main)
