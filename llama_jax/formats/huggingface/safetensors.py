"""The safetensors format: a JSON header of names, shapes and offsets, then the numbers.

Reading trusts nothing: what is returned lies inside the file, whole and without overlap. Writing
streams: offsets follow from shapes, so each tensor is asked for once, written and dropped. Does
not know what the tensors are for.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.errors import UserError, describe_file
from llama_jax.formats.json_files import parse_object, shown
from llama_jax.formats.weights import Tensor, mapped

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
LONGEST_NAME = 200  # characters
MOST_DIMS = 32  # NumPy stops at 64
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
FOR_TRANSFORMERS = {"format": "pt"}  # metadata without which it refuses a file
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, promised, and its metadata.

    Raises:
      UserError: one line, if the header is not sound or does not describe exactly this file.
    """
    entries, data = _header(path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ is {shown(metadata)}; expected texts by name")
    places = {name: _place(path, name, entry) for name, entry in entries.items()}
    _require_contiguous(path, places, path.stat().st_size - data)
    tensors = {
        name: mapped(path, data + place.begin, place.shape, place.dtype)
        for name, place in places.items()
    }
    return tensors, metadata


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] = FOR_TRANSFORMERS,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """A new file with these tensors.

    Each tensor is read once, in the given order but wider dtypes first: so every tensor begins at
    a multiple of its item size, on which PyTorch insists.

    Args:
      report: called with the bytes of tensors written so far.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    ends = list(itertools.accumulate(tensor.nbytes for _, tensor in ordered))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for (name, tensor), end in zip(ordered, ends):
        offsets = [end - tensor.nbytes, end]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), end in zip(ordered, ends):
            file.write(_bytes(name, tensor))
            report(end)


def _bytes(name: str, tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they are stored."""
    array = tensor.read()
    assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, parsed, and where the numbers begin."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected safetensors")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > min(size - 8, LONGEST_HEADER):
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
    """Where a tensor lies in the data, and what it is."""

    where: str  # what an error calls it
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _place(path: Path, name: str, entry: Any) -> _Place:
    """A header's entry, checked in itself."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise UserError(f"{path} has a tensor named {shown(name)}; expected a name to read")
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} has {shown(entry)}; expected dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{where} has dtype {shown(dtype)}; expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MOST_DIMS:
        raise UserError(f"{where} has shape {shown(shape)}; expected at most {MOST_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has data_offsets {shown(offsets)}; expected two numbers")
    # Without the zeros: NumPy cannot make even an empty array of absurd sizes.
    most = math.prod(size for size in shape if size) * DTYPES[dtype].itemsize
    begin, end = offsets
    if most >= 2**63 or end - begin != (0 if 0 in shape else most):
        place = f"{dtype} of shape {shown(shape)} at data_offsets {shown(offsets)}"
        raise UserError(f"{where} is {place}, which is not its size; copy the file again")
    return _Place(where, DTYPES[dtype], tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _require_contiguous(path: Path, places: dict[str, _Place], size: int) -> None:
    """Each tensor begins where the one before it ended, and the last ends where the file does."""
    end = 0
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != end:
            problem = f"begins at byte {shown(place.begin)} where {end} is expected"
            raise UserError(f"{place.where} {problem}: a gap or an overlap; copy the file again")
        end = place.end
    if end != size:
        raise UserError(f"{path} has {size:,} bytes of tensors, its header says {shown(end)}")
