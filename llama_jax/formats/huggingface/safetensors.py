"""Tensors in safetensors files: one, or several with an index; those of torch.save in folders too.

A file is a JSON header with names, shapes and offsets, then the numbers. Nothing in a header is
trusted: tensors are inside the file and do not overlap. Writing needs no tensor in memory before
its turn, since offsets follow from shapes.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.errors import UserError, describe_file
from llama_jax.formats.json_files import parse_object, read_object, shown, write_object
from llama_jax.formats.torch import reader as torch_reader
from llama_jax.formats.weights import Tensor, find_file, mapped

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_NAME = re.compile(r"[\w. -]{1,200}\.(safetensors|bin)", re.ASCII)
TORCH_SINGLE = "pytorch_model.bin"  # read by `formats.torch.reader`, which runs nothing in it
MAX_SHARDS = 10_000
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_NAME = 200  # characters
MAX_DIMS = 32  # NumPy has at most 64
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
}
for size in (1, 2, 4, 8):
    DTYPES |= {f"I{8 * size}": np.dtype(f"i{size}"), f"U{8 * size}": np.dtype(f"u{size}")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # without which transformers refuses a file
Report = Callable[[int], None]


# ---- folders ----


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder by name: of its safetensors, else of its pytorch_model.bin.

    Raises:
      UserError: if there are none, or an index and its shards disagree.
    """
    for name in (SINGLE, TORCH_SINGLE):
        if single := find_file(folder, name):
            return _read_file(single)
        if index := find_file(folder, f"{name}.index.json"):
            return _read_shards(folder, index)
    expected = "give a folder with a model's safetensors"
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; {expected}")


def _read_file(path: Path) -> dict[str, Tensor]:
    return torch_reader.read(path) if path.suffix == ".bin" else read(path)


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names."""
    listed = collections.defaultdict(set)
    for name, file_name in _weight_map(index).items():
        listed[file_name].add(name)
    if len(listed) > MAX_SHARDS:
        raise UserError(f"{index} names {len(listed):,} files; expected at most {MAX_SHARDS:,}")
    paths = {name: find_file(folder, name) for name in sorted(listed)}
    if missing := [name for name, path in paths.items() if path is None]:
        raise UserError(
            f"{folder} lacks {_some(missing)} of the {len(listed)} shards that {index.name} names;"
            " download them too"
        )
    tensors: dict[str, Tensor] = {}
    for path in filter(None, paths.values()):
        shard = _read_file(path)
        if twice := tensors.keys() & shard.keys():
            raise UserError(f"{path} and an earlier shard both hold {_some(twice)}; expected one")
        if absent := listed[path.name] - shard.keys():
            raise UserError(f"{path} lacks {_some(absent)}, which {index.name} says it holds")
        tensors |= shard
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor's shard."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: weight_map is {shown(places)}; expected a file name by tensor")
    kind = ".bin" if index.name.startswith(TORCH_SINGLE) else ".safetensors"
    for name in places.values():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name) or not name.endswith(kind):
            expected = f"expected the bare name of a {kind} file beside it"
            raise UserError(f"{index}: weight_map names the file {shown(name)}; {expected}")
    return places


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return shown(first) + (f" and {len(rest)} more" if rest else "")


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], max_bytes: float, report: Report
) -> None:
    """Write one file, or an index and shards of at most `max_bytes` each, or of one tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write(folder / SINGLE, tensors, report)
        return
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / name, shard, lambda done, before=total: report(before + done))  # type: ignore[misc]
        places |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    write_object(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


# ---- files ----


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
      UserError: if the header is broken or does not describe exactly this file.
    """
    entries, start = _read_header(path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ is {shown(metadata)}; expected strings by name")
    places = {name: _parse_entry(path, name, entry) for name, entry in entries.items()}
    end, size = 0, path.stat().st_size - start
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != end:
            problem = f"begins at byte {shown(place.begin)} where {end} is expected"
            raise UserError(f"{place.where} {problem}: a gap or an overlap; copy the file again")
        end = place.end
    if end != size:
        raise UserError(f"{path} has {size:,} bytes of tensors, its header says {shown(end)}")
    return {
        name: mapped(path, start + place.begin, place.shape, place.dtype)
        for name, place in places.items()
    }


def write(path: Path, tensors: Mapping[str, Tensor], report: Report = lambda done: None) -> None:
    """Write a new file; each tensor is read once and dropped.

    Tensors of wider dtypes come first, so that each begins at a multiple of its item size, as
    PyTorch requires.

    Args:
      report: called with the bytes of tensors written so far.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    ends = list(itertools.accumulate(tensor.nbytes for _, tensor in ordered))
    header: dict[str, Any] = {"__metadata__": METADATA}
    for (name, tensor), end in zip(ordered, ends):
        offsets = [end - tensor.nbytes, end]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), end in zip(ordered, ends):
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array
            report(end)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the parsed header, and the offset of the numbers."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected safetensors")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER):
            sizes = f"its header would have {length:,} bytes, the file has {size:,}"
            problem = f"not safetensors: {sizes}; copy it again"
            raise UserError(f"{path} is {describe_file(head) or problem}")
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise UserError(f"{path} is not safetensors: its header is no JSON object; copy it again")
    return parse_object(text, f"{path} (header)"), 8 + length


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor is among the numbers, its shape and dtype."""

    where: str  # for messages
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _parse_entry(path: Path, name: str, entry: Any) -> _Place:
    if not name.isprintable() or len(name) > MAX_NAME:
        raise UserError(f"{path} has a tensor named {shown(name)}; expected a readable name")
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} has {shown(entry)}; expected dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has dtype {shown(dtype)}; expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMS:
        raise UserError(f"{where} has shape {shown(shape)}; expected at most {MAX_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has data_offsets {shown(offsets)}; expected two numbers")
    # Without the zeros: NumPy cannot make even an empty array of absurd sizes.
    nbytes = math.prod(n for n in shape if n) * DTYPES[dtype].itemsize
    begin, end = offsets
    if nbytes >= 2**63 or end - begin != (0 if 0 in shape else nbytes):
        place = f"{dtype} of shape {shown(shape)} at data_offsets {shown(offsets)}"
        raise UserError(f"{where} is {place}, which is not its size; copy the file again")
    return _Place(where, DTYPES[dtype], tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
