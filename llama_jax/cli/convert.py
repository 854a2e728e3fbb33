"""Turn any Llama's weights into another project's format, and back.

python convert.py --from meta --input llama-2-7b/ --to ckpt --output ckpt/llama-2-7b
python convert.py --input ckpt/llama-2-7b --to hf --output my-llama      # for transformers
python convert.py --input ckpt/ --to gguf --output my.gguf --dtype q8_0  # for llama.cpp
python convert.py --input stories15M.bin --tokenizer tokenizer.bin --output ckpt/stories15M
python convert.py --input ckpt/llama-2-7b --output ckpt/small --quantize int4    # to sample with
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from llama_jax.cli import main as cli

FORMATS = ("ckpt", "meta", "hf", "llama2c", "gguf")
KINDS, TEMPLATES = ("int8", "int4"), ("llama2", "alpaca", "none")
DTYPES = ("float32", "bfloat16", "float16", "q8_0")


def main(argv: list[str]) -> None:
    """Flags in, a model in another format out."""
    flags = _parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here needs an accelerator's memory

    from llama_jax.cli.convert import convert_and_tell
    from llama_jax.formats.convert import Conversion
    from llama_jax.formats.registry import Options, format_of
    from llama_jax.quantization import QuantizationConfig

    quantization = None
    if flags.quantize:
        quantization = QuantizationConfig(flags.quantize, flags.group_size or 32)
    source = Path(flags.input).expanduser()
    job = Conversion(
        source=flags.source or format_of(source),
        input=source,
        target=flags.target,
        output=Path(flags.output).expanduser(),
        tokenizer=Path(flags.tokenizer).expanduser() if flags.tokenizer else None,
        options=Options(
            dtype=flags.dtype,
            shards=flags.shards,
            llama2c_version=flags.llama2c_version,
            group_size=64 if flags.group_size is None else flags.group_size,
            quantization=quantization,
        ),
        template=flags.template,
        strict=flags.strict,
    )
    convert_and_tell(job, flags.verify)


def _parser() -> cli.Parser:
    """The flags."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, help="folder or file to read")
    add("--from", dest="source", choices=FORMATS, default="", help="its format (told by its look)")
    add("--output", required=True, help="folder or file to make; must not exist yet")
    target_help = "its format (ckpt); llama2c gets a tokenizer.bin beside it unless one is there"
    add("--to", dest="target", choices=FORMATS, default="ckpt", help=target_help)
    tokenizer_help = "tokenizer.model, or llama2.c's tokenizer.bin (what comes with the input)"
    add("--tokenizer", default="", help=tokenizer_help)
    dtype_help = "of what is written (that of the input); q8_0 is gguf's alone"
    add("--dtype", choices=DTYPES, default="", help=dtype_help)
    add("--shards", type=int, default=1, help="files of --to meta: 1, 2, 4 or 8 (1)")
    version_help = "of --to llama2c: 0 and 1 are float32, 2 is int8 (0)"
    add("--llama2c_version", type=int, choices=(0, 1, 2), default=0, help=version_help)
    quantize_help = "matrices of --to ckpt as integers; another format made of it is float again"
    add("--quantize", choices=KINDS, default="", help=quantize_help)
    group_help = "numbers a scale: of int4, 32 or 64 (32); of llama2.c's version 2 (64)"
    add("--group_size", type=int, help=group_help)
    template_help = "chat format that a checkpoint tells of itself (what the input's tells)"
    add("--template", choices=TEMPLATES, default="", help=template_help)
    verify_help = "run result and source, and compare (yes, if memory allows)"
    add("--verify", action="store_true", default=None, help=verify_help)
    add("--no_verify", dest="verify", action="store_false", help="do not")
    add("--strict", action="store_true", help="refuse weights with NaN or infinity (warn)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


NEXT = {  # what a user may want to type next
    "ckpt": "sample with: python sample.py --ckpt {}",
    "gguf": "run with: llama-cli -m {}",
    "llama2c": "run with: ./run {}",
}


def convert_and_tell(job: Any, verifies: bool | None) -> None:
    """Convert a model and print lines about it.

    Args:
      verifies: whether to run it and its source; None: if memory allows.

    Raises:
      UserError: when it cannot be converted, or the result differs from its source.
    """
    from llama_jax.formats.convert import convert
    from llama_jax.formats.verify import is_cheap, memory_needed, verify
    from llama_jax.model.parameters import count_parameters

    begun = time.perf_counter()
    source = convert(job)
    files = [job.output, *job.output.rglob("*")]
    size = sum(path.stat().st_size for path in files if path.is_file())
    seconds = time.perf_counter() - begun
    parameters = count_parameters(source.config)
    print(f"{job.output}: {parameters:,} parameters, {size / 1e9:,.3f} GB in {seconds:.1f} s")
    if verifies is None and not is_cheap(source):
        needed = memory_needed(source) / 1e9
        print(f"not verified: that takes {needed:.0f} GB of memory and a while; --verify does it")
    elif verifies is not False:
        for line in verify(job, source):
            print(line, flush=True)
    if job.target in NEXT:
        print(NEXT[job.target].format(job.output))
