"""Learn whether a run fits: python plan.py --config configs/7b.py --target v5e-8

The real train step is compiled for TPUs that are not here, which takes a minute or two and the
extra `pip install '.[plan]'`; --fast only estimates, at once. GPUs are always estimated. Sampling
is planned with --mode decode. Settings of the config are overridden as --config.section.name=value.
"""

import os
from typing import Any

from llama_jax.cli import main as cli
from llama_jax.cli.config_flags import read_config
from llama_jax.errors import UsageError

SAMPLING = ("batch", "context", "quantize", "cache_dtype", "dtype")  # flags of --mode decode


def flags_of(argv: list[str]) -> tuple[Any, list[str]]:
    """What the command line asks for, and its words about the config."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="file of the run's settings; default configs/demo.py")
    parser.add_argument("--target", default="", help="such as v5e-8, v5p-64, v5e:4x4, H200-8")
    parser.add_argument("--mode", default="train", choices=("train", "decode"), help="what to plan")
    parser.add_argument("--fast", action="store_true", help="estimate only, without the compiler")
    parser.add_argument("--search", action="store_true", help="rank meshes, microbatches and remat")
    parser.add_argument("--table", action="store_true", help="which config fits where, as Markdown")
    decode = parser.add_argument_group("with --mode decode")
    decode.add_argument("--batch", type=int, default=1, help="texts at once")
    decode.add_argument("--context", type=int, default=0, help="tokens a text; 0: the model's")
    decode.add_argument("--quantize", default="", help="int8 or int4: matrices in so many bits")
    decode.add_argument("--cache_dtype", default="", help="int8: a cache of half the size")
    decode.add_argument("--dtype", default="", help="float32 or bfloat16; empty: as it computes")
    flags, words = parser.parse_known_args(argv)
    if flags.table and argv != ["--table"]:
        other = next(word for word in argv if word != "--table")
        raise UsageError(f"--table shows all configs as they are; leave out {other!r}")
    idle = [name for name in SAMPLING if getattr(flags, name) != parser.get_default(name)]
    if idle and flags.mode != "decode":
        raise UsageError(f"--{idle[0]} is about sampling; add --mode decode or leave it out")
    if flags.search and flags.mode == "decode":
        raise UsageError("--search ranks ways to train; leave out --search or --mode decode")
    return flags, words if flags.config is None else ["--config", flags.config, *words]


def main(argv: list[str]) -> int:
    """Flags in, a report out."""
    flags, words = flags_of(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here runs on an accelerator
    if flags.table:
        print(table_of_configs())
        return 0
    config = read_config(words, default=str(cli.CONFIGS / "demo.py"))
    if not flags.target:
        raise UsageError("--target is missing; expected devices such as v5e-8 or H200-1")

    from llama_jax.planning.targets import parse_target

    print(report(config, parse_target(flags.target), flags))
    return 0


def report(config: Any, target: Any, flags: Any) -> str:
    """The text of what is asked for."""
    compile_it = not flags.fast
    if flags.mode == "decode":
        from llama_jax.planning.decoding import Sampling, plan_decoding
        from llama_jax.planning.report import decoding_report

        sampling = Sampling(**{name: getattr(flags, name) for name in SAMPLING})
        plan = plan_decoding(config.model, sampling, target, compile_it=compile_it)
        return decoding_report(plan)
    if flags.search:
        from llama_jax.planning.report import search, search_report

        return search_report(config, target, search(config, target, compile_it=compile_it))
    from llama_jax.planning.report import training_report
    from llama_jax.planning.training import plan_training

    return training_report(plan_training(config, target, compile_it=compile_it))


def table_of_configs() -> str:
    """The table of all shipped configs."""
    from llama_jax.planning.report import table

    paths = sorted(cli.CONFIGS.glob("*.py"), key=lambda path: path.stem)
    return table({path.stem: read_config([], default=str(path)) for path in paths})
