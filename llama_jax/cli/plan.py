"""Predict whether a run fits: python plan.py --config 7b --target v5e-8

For TPUs the real train step is compiled, on any machine, which takes a minute or two and needs
`pip install '.[plan]'`; without it, for GPUs and with --fast the plan is an estimate, made in
seconds. --mode decode plans decoding. Settings of the config are overridden as
--config.section.name=value.
"""

import json
import os
from functools import partial
from typing import Any

from llama_jax.cli import main as cli
from llama_jax.cli.config_flags import read_config, shipped_configs
from llama_jax.errors import UsageError, warn
from llama_jax.files import progress

DECODING_FLAGS = ("batch", "context", "quantize", "cache_dtype", "dtype")


def parse_flags(argv: list[str]) -> tuple[Any, list[str]]:
    """Return the parsed flags, and the arguments about the config."""
    parser = cli.Parser("--target", description=__doc__.splitlines()[0])
    config_help = "config of the run: a file, or the name of a shipped one"
    parser.add_argument("--config", metavar="FILE", default="demo", help=config_help)
    parser.add_argument("--target", default="", help="such as v5e-8, v5p-64, v5e:4x4, H200-8")
    parser.add_argument("--mode", default="train", choices=("train", "decode"), help="what to plan")
    parser.add_argument("--fast", action="store_true", help="estimate only, do not compile")
    parser.add_argument("--search", action="store_true", help="rank meshes, microbatches and remat")
    parser.add_argument(
        "--table", action="store_true", help="which config fits on which target, as Markdown"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    decode = parser.add_argument_group("with --mode decode")
    decode.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    decode.add_argument(
        "--context", type=int, default=0, help="tokens per sequence; 0: the model's context"
    )
    decode.add_argument("--quantize", default="", help="int8, int4 or nf4: quantize the weights")
    decode.add_argument("--cache_dtype", default="", help="int8: quantize the KV cache")
    decode.add_argument(
        "--dtype", default="", help="float32 or bfloat16; empty: the model's compute dtype"
    )
    flags, words = parser.parse_known_args(argv)
    if flags.table and argv != ["--table"]:
        other = next(word for word in argv if word != "--table")
        raise UsageError(f"--table plans every config unchanged; leave out {other!r}")
    unused = [name for name in DECODING_FLAGS if getattr(flags, name) != parser.get_default(name)]
    if unused and flags.mode != "decode":
        raise UsageError(f"--{unused[0]} is for decoding; add --mode decode or leave it out")
    if flags.search and flags.mode == "decode":
        raise UsageError("--search is for training; leave out --search or --mode decode")
    return flags, words


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    flags, words = parse_flags(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here runs on an accelerator
    if flags.table:
        print(table_of_configs())
        return 0
    config = read_config(flags.config, words)
    if not flags.target:
        raise UsageError("--target is missing; expected devices such as v5e-8 or H200-1")

    from llama_jax.planning.targets import parse_target

    target = parse_target(flags.target)
    with progress(f"planning for {flags.target}"):
        text = report(config, target, flags)
    print(text)
    return 0


def report(config: Any, target: Any, flags: Any) -> str:
    """Return the report that the flags request."""
    from llama_jax.planning import compile, decoding, report, search, training

    compiles = target.chip.is_tpu and not flags.fast
    if compiles and not compile.is_installed():
        warn(
            "the TPU compiler is not installed, so this is an estimate; for the compiler's figures"
            " install it with `pip install '.[plan]'`"
        )
        compiles = False
    if flags.mode == "decode":
        values = {name: getattr(flags, name) for name in DECODING_FLAGS}
        plan = decoding.plan_decoding(
            config.model,
            decoding.DecodingOptions(**values),
            target,
            decoding.compile_decoding if compiles else None,
        )
        return _as_json(report.figures(plan)) if flags.json else report.decoding_report(plan)
    compiler = training.compile_training if compiles else None
    if flags.search:
        found = search.search(config, target, compiler)
        if flags.json:
            change = partial(report.flags_of, old=config, target=target)
            return _as_json([report.figures(p) | {"flags": change(p.config)} for p in found])
        return report.search_report(config, target, found)
    trained = training.plan_training(config, target, compiler)
    return _as_json(report.figures(trained)) if flags.json else report.training_report(trained)


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2)


def table_of_configs() -> str:
    """Return the table of all shipped configs."""
    from llama_jax.planning.report import table

    with progress("planning all configs"):
        return table({name: read_config(name) for name in shipped_configs()})
