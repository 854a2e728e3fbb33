"""Import Meta's Llama weights: python convert_meta.py --input llama-2-7b/ --output ckpt/llama-2-7b

The same as `convert.py --from meta --to ckpt`.
"""

import os
from pathlib import Path

from llama_jax.cli import main as cli

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> None:
    """Flags in, a checkpoint folder out."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", required=True, help="folder with params.json and consolidated.*.pth")
    add("--output", required=True, help="checkpoint folder to make; must not exist yet")
    tokenizer_help = "tokenizer.model, if it is neither in the folder nor one level up"
    add("--tokenizer", default="", help=tokenizer_help)
    add("--dtype", choices=DTYPES, default="", help="of what is written; empty: as it is")
    add("--verify", action="store_true", default=None, help="compare with Meta's forward pass")
    add("--no_verify", dest="verify", action="store_false", help="do not")
    add("--strict", action="store_true", help="refuse weights with NaN or infinity")
    flags = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here needs an accelerator's memory

    from llama_jax.cli.convert import convert_and_tell
    from llama_jax.formats.convert import Conversion
    from llama_jax.formats.registry import Options

    job = Conversion(
        source="meta",
        input=Path(flags.input).expanduser(),
        target="ckpt",
        output=Path(flags.output).expanduser(),
        tokenizer=Path(flags.tokenizer).expanduser() if flags.tokenizer else None,
        options=Options(dtype=flags.dtype),
        strict=flags.strict,
    )
    convert_and_tell(job, flags.verify)
