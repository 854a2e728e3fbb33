"""Import Meta's Llama weights: python convert_meta.py --input llama-2-7b/ --output ckpt/llama-2-7b

Equal to `convert.py --from meta --to ckpt`.
"""

import os
from pathlib import Path

from llama_jax.cli import main as cli

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> None:
    """Convert Meta's weights as flags say."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", required=True, help="folder with params.json and consolidated.*.pth")
    add("--output", required=True, help="checkpoint folder to create; must not exist yet")
    tokenizer_help = "tokenizer.model (default: in the folder or one level up)"
    add("--tokenizer", default="", help=tokenizer_help)
    add("--dtype", choices=DTYPES, default="", help="of the output (default: that of the input)")
    add(
        "--verify",
        action="store_true",
        default=None,
        help="compare with Meta's forward pass (default: if memory allows)",
    )
    add("--no_verify", dest="verify", action="store_false", help="do not compare")
    add("--strict", action="store_true", help="refuse weights with NaN or infinity (default: warn)")
    flags = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here needs an accelerator

    from llama_jax.cli.convert import convert_and_report
    from llama_jax.formats.convert import Conversion, Options

    job = Conversion(
        source="meta",
        input=Path(flags.input).expanduser(),
        target="ckpt",
        output=Path(flags.output).expanduser(),
        tokenizer=Path(flags.tokenizer).expanduser() if flags.tokenizer else None,
        options=Options(dtype=flags.dtype),
        strict=flags.strict,
    )
    convert_and_report(job, flags.verify)
