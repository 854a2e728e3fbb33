"""Convert the weights of any Llama to another project's format, and back.

python convert.py --from meta --input llama-2-7b/ --to ckpt --output ckpt/llama-2-7b
python convert.py --input ckpt/llama-2-7b --to hf --output my-llama      # for transformers
python convert.py --input ckpt/ --to gguf --output my.gguf --dtype q8_0  # for llama.cpp
python convert.py --input stories15M.bin --tokenizer tokenizer.bin --output ckpt/stories15M
python convert.py --input ckpt/llama-2-7b --output ckpt/small --quantize int4    # to sample with
python convert.py --input smollm2 --output ckpt/smollm2                          # to chat with
python convert.py --input ckpt/sft_lora --merge --to hf --output my-chat         # base + adapters
python convert.py --input ckpt/sft_lora --to peft --output my-adapter            # for PEFT
python convert.py --input my-adapter --base ckpt/llama-2-7b --output ckpt/adapter
"""

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import Any

from llama_jax.cli import main as cli
from llama_jax.errors import UsageError, as_started
from llama_jax.files import first_with_progress

FORMATS = ("ckpt", "meta", "hf", "llama2c", "gguf")
PEFT = "peft"  # of adapters alone
KINDS = ("int8", "int4", "nf4")
DTYPES = ("float32", "bfloat16", "float16", "q8_0")
NEXT = {  # what a user may want to run next: in place of {}, the quoted path
    "ckpt": "sample with: python sample.py --ckpt {}",
    "gguf": "run with: llama-cli -m {}",
}
# llama2.c's `run` reads version 0 alone, `runq` version 2; neither reads version 1.
LLAMA2C_NEXT = {0: "run with: ./run {}", 2: "run with: ./runq {}"}


def main(argv: list[str]) -> None:
    """Convert a model as flags say."""
    flags = _parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here needs an accelerator

    from llama_jax.formats.convert import Conversion, Options, format_of
    from llama_jax.formats.named_models import find_named
    from llama_jax.quantization import QuantizationConfig
    from llama_jax.text.chat_formats import NO_TEMPLATE, read_template

    quantization = None
    if flags.quantize:
        quantization = QuantizationConfig(flags.quantize, flags.group_size or 32)
    named = find_named(flags.input)
    source = named.fetch() if named else Path(flags.input).expanduser()
    found, adapter = flags.source or format_of(source), None
    if flags.merge:
        adapter, source = source, _base(flags, source)
        found = format_of(source)
    elif PEFT in (found, flags.target):
        _convert_adapters(flags, source, found)
        return
    elif flags.base:
        raise UsageError("--base is the model of adapters; it goes with --merge or PEFT's folders")
    job = Conversion(
        source=found,
        input=source,
        adapter=adapter,
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
        generation=named.generation if named else {},
        template=flags.template if flags.template == NO_TEMPLATE else read_template(flags.template),
        strict=flags.strict,
    )
    convert_and_report(job, flags.verify)


def _base(flags: argparse.Namespace, adapter: Path) -> Path:
    """Return the model that adapters are merged into.

    Raises:
      UserError: if the input holds no adapters, or does not say where their model is.
    """
    from llama_jax.formats import adapters
    from llama_jax.formats.named_models import checkpoint_path

    if not adapters.is_adapter(adapter):
        raise UsageError(f"{adapter} holds no adapters to merge; leave --merge out")
    base = flags.base
    if not base and not (adapter / adapters.SETTINGS).is_file():
        base = adapters.read(adapter).base
    if not base:
        raise UsageError(f"--merge needs the model that {adapter} belongs to; name it with --base")
    return checkpoint_path(base)


def _convert_adapters(flags: argparse.Namespace, source: Path, found: str) -> None:
    """Write adapters of ours as a folder of PEFT, or the other way."""
    from llama_jax.formats import adapters
    from llama_jax.formats.named_models import checkpoint_path

    output = Path(flags.output).expanduser()
    if not adapters.is_adapter(source):
        raise UsageError(f"{source} holds no adapters; expected those of a run with lora.rank")
    for name in ("dtype", "quantize", "template", "tokenizer"):
        if getattr(flags, name):
            raise UsageError(f"--{name} is for models, not adapters alone; leave it out")
    if found == PEFT:
        if flags.target != "ckpt":
            raise UsageError(f"--to {flags.target} needs a model; add --merge and --base")
        if not flags.base:
            raise UsageError("--from peft needs a checkpoint of the adapter's model; add --base")
        count = adapters.from_peft(source, checkpoint_path(flags.base), output)
        print(f"{output}: adapters of {count:,} parameters")
        print(as_started(NEXT["ckpt"].format(shlex.quote(str(output)))))
        return
    count = adapters.write_peft(source, output)
    print(f"{output}: adapters of {count:,} parameters, for PEFT")


def _parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, help="folder or file to read, or smollm2, which is fetched")
    source_help = "its format (default: detected from the files)"
    add("--from", dest="source", choices=(*FORMATS, PEFT), default="", help=source_help)
    add("--output", required=True, help="folder or file to create; must not exist yet")
    target_help = "its format (default: ckpt); llama2c writes a tokenizer.bin beside it if missing"
    add("--to", dest="target", choices=(*FORMATS, PEFT), default="ckpt", help=target_help)
    add("--merge", action="store_true", help="convert the model of adapters with them merged in")
    base_help = "model of the adapters in --input (default: the one that they were trained for)"
    add("--base", default="", help=base_help)
    tokenizer_help = "tokenizer.model, tokenizer.json or tokenizer.bin (default: that of the input)"
    add("--tokenizer", default="", help=tokenizer_help)
    dtype_help = "of the output (default: that of the input); q8_0 only with --to gguf"
    add("--dtype", choices=DTYPES, default="", help=dtype_help)
    add("--shards", type=int, default=1, help="files of --to meta: 1, 2, 4 or 8 (default: 1)")
    version_help = "of --to llama2c: 0 and 1 are float32, 2 is int8 (default: 0)"
    add("--llama2c_version", type=int, choices=(0, 1, 2), default=0, help=version_help)
    quantize_help = "store the matrices of --to ckpt as integers; other formats dequantise them"
    add("--quantize", choices=KINDS, default="", help=quantize_help)
    group_help = "numbers per scale: for int4 32 or 64 (default: 32), for llama2c version 2 (64)"
    add("--group_size", type=int, help=group_help)
    template_help = "chat format by name, none, or a .jinja file (default: that of the input)"
    add("--template", default="", help=template_help)
    verify_help = "run output and input, and compare (default: if memory allows)"
    add("--verify", action="store_true", default=None, help=verify_help)
    add("--no_verify", dest="verify", action="store_false", help="do not compare")
    add("--strict", action="store_true", help="refuse weights with NaN or infinity (default: warn)")
    return parser


def convert_and_report(job: Any, verify: bool | None) -> None:
    """Convert a model and print lines about it.

    Args:
      verify: whether to compare the output with the input; None: if memory allows.

    Raises:
      UserError: if it cannot be converted, or the output differs from the input.
    """
    from llama_jax.checkpoints.run_folder import format_size
    from llama_jax.formats import verify as verification
    from llama_jax.formats.convert import TOKENIZER_BIN, convert
    from llama_jax.model.parameters import count_parameters

    start = time.perf_counter()
    source = convert(job)
    files = [job.output, *job.output.rglob("*")]
    size = sum(path.stat().st_size for path in files if path.is_file())
    seconds = time.perf_counter() - start
    parameters = count_parameters(source.config)
    print(f"{job.output}: {parameters:,} parameters, {format_size(size)} in {seconds:.1f} s")
    if verify is None and not verification.is_cheap(source):
        needed = verification.memory_needed(source) / 1e9
        print(f"not verified: that takes {needed:.0f} GB of memory and a while; --verify does it")
    elif verify is not False:
        for line in first_with_progress("verifying", verification.verify(job, source)):
            print(line, flush=True)
    following = NEXT.get(job.target, "")
    if job.target == "llama2c":
        following = LLAMA2C_NEXT.get(job.options.llama2c_version, "")
        if following and job.output.parent != Path():  # they look for it in the working directory
            following += f" -z {shlex.quote(str(job.output.parent / TOKENIZER_BIN))}"
    if following:
        print(as_started(following.format(shlex.quote(str(job.output)))))
