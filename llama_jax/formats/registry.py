"""Every format by its short name, with the same two functions, and which one a path is of.

The formats themselves know nothing of each other.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.formats.gguf import model as gguf
from llama_jax.formats.huggingface import model as hugging_face
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.meta import model as meta
from llama_jax.formats.weights import DTYPES, Weights
from llama_jax.quantization import QuantizationConfig

Report = Callable[[int], None]
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 34 / 32, "int8": 1.25}  # a number
BYTES |= {"int4": 0.9}
LARGEST_CONFIG = 2**20  # bytes read to tell one folder from another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to write, where a format leaves a choice."""

    dtype: str = ""  # empty: as the weights are, where the format can hold it
    shards: int = 1  # files of Meta's
    llama2c_version: int = 0
    group_size: int = 64  # of llama2.c's version 2
    quantization: QuantizationConfig | None = None  # of our checkpoints


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store a model."""

    what: str
    read: Callable[[Path, Path | None], Weights]  # a path, and a tokenizer instead of its own
    write: Callable[[Weights, Path, Options, Report], None]
    dtypes: tuple[str, ...] = tuple(DTYPES)  # that it can be written in
    needs_tokenizer: bool = True
    casts: bool = False  # turns numbers into the dtype by itself


FORMATS = {
    "ckpt": Format(
        "a checkpoint folder of ours",
        lambda path, _: checkpoint_folder.read(path),
        lambda weights, path, options, report: checkpoint_folder.write(
            weights, path, quantization=options.quantization, report=report
        ),
    ),
    "meta": Format(
        "Meta's folder of params.json and consolidated.*.pth",
        meta.read,
        lambda weights, path, options, report: meta.write(
            weights, path, shards=options.shards, report=report
        ),
    ),
    "hf": Format(
        "a Hugging Face folder of config.json and *.safetensors",
        hugging_face.read,
        lambda weights, path, _, report: hugging_face.write(weights, path, report=report),
    ),
    "llama2c": Format(
        "a file of llama2.c's",
        lambda path, _: llama2c.read(path),
        lambda weights, path, options, report: llama2c.write(
            weights,
            path,
            version=options.llama2c_version,
            group_size=options.group_size,
            report=report,
        ),
        dtypes=("float32",),
        needs_tokenizer=False,
        casts=True,
    ),
    "gguf": Format(
        "a file of llama.cpp's",
        lambda path, _: gguf.read(path),
        lambda weights, path, options, report: gguf.write(
            weights, path, dtype=options.dtype, report=report
        ),
        dtypes=(*DTYPES, "q8_0"),
        casts=True,
    ),
}


def written_dtype(target: str, weights: Weights, options: Options) -> str:
    """What the matrices of a model become in a format."""
    if target == "llama2c":
        return "int8" if options.llama2c_version == 2 else "float32"
    if options.quantization:
        return options.quantization.kind
    return options.dtype or weights.dtype.name


def bytes_written(target: str, weights: Weights, options: Options) -> int:
    """About how many bytes a format takes for a model, a little more rather than less."""
    names = [*weights.tensors, *(["embedding"] if target == "meta" else [])]  # Meta's are untied
    numbers = sum(math.prod(weights.tensors[name].shape) for name in names)
    width = BYTES[written_dtype(target, weights, options)]
    return int(1.01 * width * numbers) + 4 * len(weights.tokenizer) + 2**20


def format_of(path: Path) -> str:
    """The name of the format that a path seems to be of.

    Raises:
      UserError: when it does not exist or cannot be told.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder or file of a model")
    if path.suffix in (".gguf", ".bin", ".pth"):
        return {".gguf": "gguf", ".bin": "llama2c", ".pth": "meta"}[path.suffix]
    if (path / "params.json").is_file():
        return "meta"
    for folder in (path, path.absolute().parent):  # a step's folder has it one level up
        if (folder / "config.json").is_file():
            return "hf" if _is_hugging_face(folder / "config.json") else "ckpt"
    expected = "; ".join(f"{name}: {each.what}" for name, each in FORMATS.items())
    raise UserError(f"it is not clear what {path} is; say --from ({expected})")


def _is_hugging_face(config: Path) -> bool:
    """Whether a config.json is theirs, not ours."""
    try:
        tree = json.loads(config.read_bytes()[:LARGEST_CONFIG])
    except (ValueError, RecursionError):
        return False
    return "kind" not in tree
