"""Conversion of a model from any format to any other, tensor by tensor.

The output appears when all of it is written, or not at all. `formats.verify` compares it with its
source.
"""

import contextlib
import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.run_folder import require_space
from llama_jax.errors import UserError, require, warn
from llama_jax.files import check_new_path, new_path, progress
from llama_jax.formats.llama2c import tokenizer as tokenizer_bin
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import DTYPES, Tensor, Weights, is_finite
from llama_jax.quantization import QuantizationConfig
from llama_jax.text.tokenizer import parse_tokenizer

Report = Callable[[int], None]
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 34 / 32, "int8": 1.25}
BYTES |= {"int4": 0.9, "nf4": 0.9}
MAX_CONFIG = 2**20  # bytes read to tell a folder of Hugging Face's from ours
TOKENIZER_BIN = "tokenizer.bin"  # where llama2.c's programs look for it, beside the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to write, where a format leaves a choice."""

    dtype: str = ""  # empty: that of the weights, if the format can store it
    shards: int = 1  # files of Meta's
    llama2c_version: int = 0
    group_size: int = 64  # of llama2.c's version 2
    quantization: QuantizationConfig | None = None  # of our checkpoints


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to store a model. Its module has functions `read` and `write`."""

    what: str
    module: str  # in `llama_jax.formats`; imported when used
    keywords: Callable[[Options], dict[str, Any]] = lambda options: {}  # of `write`
    dtypes: tuple[str, ...] = tuple(DTYPES)  # that it can be written in
    needs_tokenizer: bool = True
    holds_prompting: bool = True  # stop ids, whether texts begin with BOS, and the chat template
    casts: bool = False  # `write` converts to the dtype

    def read(self, path: Path, tokenizer: Path | None = None) -> Weights:
        """Return the model at a path, with another tokenizer than its own if there is one."""
        return self._module().read(path, tokenizer)

    def write(self, weights: Weights, path: Path, options: Options, report: Report) -> None:
        """Write a model; `report` is called with the bytes of tensors written so far."""
        self._module().write(weights, path, report=report, **self.keywords(options))

    def _module(self) -> Any:
        return importlib.import_module(f"llama_jax.formats.{self.module}")


FORMATS = {
    "ckpt": Format(
        "a checkpoint folder of llama_jax",
        "checkpoint",
        lambda options: {"quantization": options.quantization},
    ),
    "meta": Format(
        "Meta's folder of params.json and consolidated.*.pth",
        "meta.model",
        lambda options: {"shards": options.shards},
        holds_prompting=False,
    ),
    "hf": Format(
        "a Hugging Face folder of config.json and *.safetensors",
        "huggingface.model",
    ),
    "llama2c": Format(
        "a model file of llama2.c, or the ckpt.pt of its train.py",
        "llama2c.model",
        lambda options: {"version": options.llama2c_version, "group_size": options.group_size},
        dtypes=("float32",),
        needs_tokenizer=False,
        holds_prompting=False,
        casts=True,
    ),
    "gguf": Format(
        "a GGUF file",
        "gguf.model",
        lambda options: {"dtype": options.dtype},
        dtypes=(*DTYPES, "q8_0"),
        casts=True,
    ),
}


def format_of(path: Path) -> str:
    """Return the name of the format of a path, by its suffix or the files in it.

    Raises:
      UserError: if it does not exist, or no format is recognised.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder or file of a model")
    suffixes = {".gguf": "gguf", ".bin": "llama2c", ".pt": "llama2c", ".pth": "meta"}
    if path.suffix in suffixes:
        return suffixes[path.suffix]
    if (path / "params.json").is_file():
        return "meta"
    for folder in (
        path,
        path.absolute().parent,
    ):  # the folder of a step has its config one level up
        if (folder / "config.json").is_file():
            try:
                is_ours = "kind" in json.loads((folder / "config.json").read_bytes()[:MAX_CONFIG])
            except (ValueError, RecursionError, TypeError):
                is_ours = True
            return "ckpt" if is_ours else "hf"
    if (path / "adapter_config.json").is_file():
        return "peft"
    expected = "; ".join(f"{name}: {each.what}" for name, each in FORMATS.items())
    raise UserError(
        f"the format of {path} is not recognised; give --from ({expected})", page="models.md"
    )


def written_dtype(target: str, weights: Weights, options: Options) -> str:
    """Return what the matrices of a model are written as."""
    if target == "llama2c":
        return "int8" if options.llama2c_version == 2 else "float32"
    if options.quantization:
        return options.quantization.kind
    return options.dtype or weights.dtype.name


def bytes_written(target: str, weights: Weights, options: Options) -> int:
    """Return an upper estimate of the bytes that a format takes for a model."""
    names = [*weights.tensors, *(["embedding"] if target == "meta" else [])]  # Meta's are untied
    numbers = sum(math.prod(weights.tensors[name].shape) for name in names)
    width = BYTES[written_dtype(target, weights, options)]
    return int(1.01 * width * numbers) + 4 * len(weights.tokenizer) + 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion to be made."""

    source: str  # a key of `FORMATS`
    input: Path
    target: str  # a key of `FORMATS`
    output: Path  # does not exist yet
    tokenizer: Path | None = None  # instead of the source's own
    options: Options = dataclasses.field(default_factory=Options)
    template: str = ""  # as in `checkpoints.metadata.Description`; empty: the source's
    generation: Mapping[str, float] = dataclasses.field(default_factory=dict)  # likewise
    strict: bool = False  # refuse NaN and infinity
    adapter: Path | None = None  # a folder of adapters that are merged into the input

    def __post_init__(self) -> None:
        for name in (self.source, self.target):
            message = f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}"
            require(name in FORMATS, message)
        dtype, known = self.options.dtype, FORMATS[self.target].dtypes
        expected = f"{self.target} is written as one of {', '.join(known)}"
        require(dtype in ("", *known), f"dtype {dtype!r} does not fit: {expected}")
        is_ours = self.target == "ckpt"
        holds_template = FORMATS[self.target].holds_prompting or not self.template
        require(holds_template, f"{self.target} holds no chat template; leave --template out")
        if self.options.quantization:
            require(is_ours, "quantize is for checkpoints alone; use --to ckpt")
            message = f"dtype {dtype!r} does not go with quantize; leave one of them out"
            require(not dtype, message)


def convert(job: Conversion) -> Weights:
    """Write a model in another format, and return it as it was read from its source.

    For llama2.c, a tokenizer.bin is written beside the output unless it is there already.

    Raises:
      UserError: if the source is damaged or not a Llama, its tokenizer is missing or another
        model's, the target cannot express it, the output exists, a tokenizer.bin beside it is
        another model's, or the disk is full.
    """
    check_new_path(job.output)
    source = read_source(job)
    weights = _cast(source, job)
    if weights.tokenizer and not FORMATS[job.target].holds_prompting:
        tokenizer = parse_tokenizer(weights.tokenizer, job.input)
        if others := {*weights.stop_ids} - {tokenizer.bos_id, tokenizer.eos_id}:
            ids = ", ".join(map(str, sorted(others)))
            warn(f"the format {job.target} ends texts at BOS and EOS alone, not at tokens {ids}")
    parent = next(parent for parent in job.output.absolute().parents if parent.exists())
    require_space(parent, bytes_written(job.target, source, job.options), job.output.name)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(new_path(job.output))
        beside = job.output.parent / TOKENIZER_BIN
        if job.target == "llama2c" and weights.tokenizer:
            vocabulary = Vocabulary.from_model(weights.tokenizer)
            if not beside.exists():
                tokenizer_bin.write(vocabulary, stack.enter_context(new_path(beside)))
            elif not tokenizer_bin.has_pieces(beside, vocabulary):
                raise UserError(
                    f"{beside} is another tokenizer than that of {job.input}, and llama2.c would"
                    " use it; convert into another folder"
                )
        watched, report = stack.enter_context(_watched(weights, job))
        FORMATS[job.target].write(watched, place, job.options, report)
    return source


def read_source(job: Conversion) -> Weights:
    """Return the model to be converted, with the tokenizer to be written."""
    path, source = job.input, FORMATS[job.source]
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {source.what}")
    weights = source.read(path, job.tokenizer)
    if not weights.tokenizer and FORMATS[job.target].needs_tokenizer:
        raise UserError(
            f"{path} has no tokenizer, and {FORMATS[job.target].what} needs one; name its"
            " tokenizer.model, .json or .bin with --tokenizer"
        )
    if job.options.quantization and weights.is_rounded:
        raise UserError(f"{path} is quantised already; quantise the model that it was made from")
    if job.adapter:
        from llama_jax.formats.adapters import merged

        is_rounded_later = bool(job.options.dtype or job.options.quantization)
        weights = merged(weights, job.adapter, path, keeps_dtype=not is_rounded_later)
    content = weights.tokenizer
    return dataclasses.replace(
        weights,
        bos=weights.bos and (not content or parse_tokenizer(content, path).bos_id >= 0),
        chat_template=job.template or weights.chat_template,
        generation=job.generation or weights.generation,
    )


def _cast(weights: Weights, job: Conversion) -> Weights:
    """Return the weights in the requested dtype, and a config with the dtype to compute in."""
    dtype = job.options.dtype
    if not dtype or FORMATS[job.target].casts:
        return weights
    compute_dtype = "float32" if dtype == "float32" else "bfloat16"
    config = dataclasses.replace(weights.config, compute_dtype=compute_dtype)
    return dataclasses.replace(weights.astype(DTYPES[dtype]), config=config)


@contextlib.contextmanager
def _watched(weights: Weights, job: Conversion) -> Iterator[tuple[Weights, Report]]:
    """Yield the weights, checked for NaN and infinity as they are read, and a progress report."""
    seen: set[str] = set()

    def watched(name: str, tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            with np.errstate(over="ignore"):  # the dtype may be too narrow, which is checked next
                array = tensor.read()
            if name not in seen and not is_finite(array):
                message = f"{name} of {job.input} holds NaN or infinity as {array.dtype}"
                if job.strict:
                    raise UserError(f"{message}; nothing was written, because of --strict")
                warn(f"{message}; it is written as it is")
            seen.add(name)
            return array

        return dataclasses.replace(tensor, read=read)

    tensors = {name: watched(name, tensor) for name, tensor in weights.tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress(f"writing {job.output.name}", total) as show:
        yield (
            dataclasses.replace(weights, tensors=tensors),
            lambda done: show(done, f"tensor {len(seen)} of {len(tensors)}"),
        )
