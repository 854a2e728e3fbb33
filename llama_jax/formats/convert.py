"""From any format to any other, tensor by tensor, into a place that appears whole or not at all.

`formats.verify` checks that the result computes what the source does.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_jax.checkpoints.run_folder import require_space
from llama_jax.config import require
from llama_jax.errors import UserError, warn
from llama_jax.files import check_new_path, new_path, progress
from llama_jax.formats.llama2c import tokenizer as tokenizer_bin
from llama_jax.formats.llama2c.tokenizer import tokenizer_model
from llama_jax.formats.registry import FORMATS, Options, Report, bytes_written
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import DTYPES, Tensor, Weights, is_finite

TOKENIZER_BIN = "tokenizer.bin"  # as llama2.c's programs look for it, beside the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to become what."""

    source: str  # a key of `FORMATS`
    input: Path
    target: str  # a key of `FORMATS`
    output: Path  # does not exist yet
    tokenizer: Path | None = None  # instead of the source's own
    options: Options = dataclasses.field(default_factory=Options)
    template: str = ""  # the chat format it learnt, "none" if none; empty: as the source tells
    strict: bool = False  # refuse NaN and infinity

    def __post_init__(self) -> None:
        for name in (self.source, self.target):
            message = f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}"
            require(name in FORMATS, message)
        dtype, known = self.options.dtype, FORMATS[self.target].dtypes
        expected = f"{self.target} is written as one of {', '.join(known)}"
        require(dtype in ("", *known), f"dtype {dtype!r} does not fit: {expected}")
        is_ours = self.target == "ckpt"
        require(is_ours or not self.template, "only our checkpoints tell a template; use --to ckpt")
        if self.options.quantization:
            require(is_ours, "only our checkpoints are quantised so; use --to ckpt")
            message = f"dtype {dtype!r} does not go with quantize; leave one of them out"
            require(not dtype, message)


def convert(job: Conversion) -> Weights:
    """Write a model anew in another format; returns it as it was read from its source.

    Nothing is at `job.output` until all of it is there. For llama2.c, a tokenizer.bin is put beside
    it unless there is one.

    Raises:
      UserError: when the source is damaged or no Llama, its tokenizer is missing or another
        model's, the target cannot express it, the output exists, or the disk is full.
    """
    check_new_path(job.output)
    source = read_source(job)
    weights = _in_dtype(source, job)
    needed = bytes_written(job.target, source, job.options)
    parent = next(parent for parent in job.output.absolute().parents if parent.exists())
    require_space(parent, needed, f"{job.output.name}")
    with _places(job, weights) as place, _reporting(job, weights) as (watched, report):
        FORMATS[job.target].write(watched, place, job.options, report)
    return source


def read_source(job: Conversion) -> Weights:
    """The model to be converted, with the tokenizer that goes with it."""
    path, tokenizer = job.input, job.tokenizer
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {FORMATS[job.source].what}")
    is_bin = tokenizer is not None and tokenizer.suffix == ".bin"
    weights = FORMATS[job.source].read(path, None if is_bin else tokenizer)
    if tokenizer is not None and (is_bin or job.source in ("ckpt", "llama2c", "gguf")):
        model = tokenizer_model(tokenizer, weights.config.vocab_size)
        weights = dataclasses.replace(weights, tokenizer=model)
    _check_tokenizer(job, weights)
    if job.options.quantization and weights.is_rounded:
        raise UserError(f"{path} is quantised already; quantise the model that it was made from")
    return dataclasses.replace(weights, chat_template=job.template or weights.chat_template)


def _check_tokenizer(job: Conversion, weights: Weights) -> None:
    """Refuse a tokenizer that is missing where it is needed, or is another model's."""
    if weights.tokenizer:
        pieces = len(Vocabulary.from_model(weights.tokenizer).pieces)
        if pieces != weights.config.vocab_size:
            raise UserError(
                f"the tokenizer of {job.input} has {pieces} pieces and the model"
                f" {weights.config.vocab_size}; name the one it was trained with by --tokenizer"
            )
    elif FORMATS[job.target].needs_tokenizer:
        raise UserError(
            f"{job.input} carries no tokenizer, and {FORMATS[job.target].what} needs one; name its"
            " tokenizer.model or tokenizer.bin with --tokenizer"
        )


def _in_dtype(weights: Weights, job: Conversion) -> Weights:
    """The weights as they shall be stored, and a config that says so."""
    dtype = job.options.dtype
    if not dtype or FORMATS[job.target].casts:
        return weights
    compute_dtype = "float32" if dtype == "float32" else "bfloat16"
    config = dataclasses.replace(weights.config, compute_dtype=compute_dtype)
    return dataclasses.replace(weights.astype(DTYPES[dtype]), config=config)


@contextlib.contextmanager
def _places(job: Conversion, weights: Weights) -> Iterator[Path]:
    """Where to write; a tokenizer.bin is made beside it, and appears first."""
    beside = job.output.parent / TOKENIZER_BIN
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(new_path(job.output))
        if job.target == "llama2c" and weights.tokenizer and not beside.exists():
            vocabulary = Vocabulary.from_model(weights.tokenizer)
            tokenizer_bin.write(vocabulary, stack.enter_context(new_path(beside)))
        yield place


@contextlib.contextmanager
def _reporting(job: Conversion, weights: Weights) -> Iterator[tuple[Weights, Report]]:
    """The weights, watched as they are read, and a function that shows how far writing has come."""
    read: set[str] = set()
    count = len(weights.tensors)

    def watched(name: str, tensor: Tensor) -> Tensor:
        def look() -> np.ndarray:
            with np.errstate(over="ignore"):  # the dtype may be too narrow, which is told below
                array = tensor.read()
            if name not in read and not is_finite(array):
                _complain(job, name, array.dtype)
            read.add(name)
            return array

        return dataclasses.replace(tensor, read=look)

    tensors = {name: watched(name, tensor) for name, tensor in weights.tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress(f"writing {job.output.name}", total) as show:
        yield (
            dataclasses.replace(weights, tensors=tensors),
            lambda done: show(done, f"tensor {len(read)} of {count}"),
        )


def _complain(job: Conversion, name: str, dtype: np.dtype) -> None:
    """Warn of a tensor with NaN or infinity, or refuse it."""
    message = f"{name} of {job.input} holds NaN or infinity as {dtype}"
    if job.strict:
        raise UserError(f"{message}; nothing was written, since --strict was given")
    warn(f"{message}; it is written as it is")
