"""A model's tensors in one GGUF file, or in several that its name counts."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.gguf.blocks import F16, F32, TYPES, StoredType, stored, type_name, unpacked
from llama_jax.formats.gguf.header import Header, Stored, Value, scan
from llama_jax.formats.weights import Tensor, mapped

COUNT, TOTAL = "split.count", "split.tensors.count"
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def scan_all(path: Path) -> Header:
    """The keys of the first file with the tensors of all; `UserError` if they are not one model."""
    first = scan(path)
    count = first.keys.integer(COUNT, 1)
    if count <= 1:
        return first
    match = NUMBERED.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        expected = f"name the first, which ends in -00001-of-{count:05}.gguf"
        raise UserError(f"{path} is one of {count} files of a model; {expected}")
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        part = path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf")
        for name, place in scan(part).tensors.items():
            if name in tensors:
                raise UserError(f"{part} holds {name}, which {tensors[name].path} holds as well")
            tensors[name] = place
    total = first.keys.integer(TOTAL, len(tensors))
    if total != len(tensors):
        raise UserError(f"{path} and its parts hold {len(tensors)} tensors; {TOTAL} says {total}")
    return Header(first.keys, tensors)


def promised(path: Path, tensors: dict[str, Stored]) -> dict[str, Tensor]:
    """The tensors as floats, unpacked when read.

    Raises:
      UserError: if some are of types that we do not read.
    """
    unread = [name for name, stored in tensors.items() if stored.number not in TYPES]
    if unread:
        kinds = ", ".join(sorted({type_name(tensors[name].number) for name in unread}))
        known = ", ".join(kind.name for kind in TYPES.values())
        which = unread[0] if len(unread) == 1 else f"{unread[0]} and {len(unread) - 1} more"
        raise UserError(f"{path} stores {which} as {kinds}; expected {known}")
    return {name: _promise(stored) for name, stored in tensors.items()}


def _promise(stored: Stored) -> Tensor:
    kind = TYPES[stored.number]
    if kind.unpack is None:
        return mapped(stored.path, stored.offset, stored.shape, kind.dtype)
    blocks = (stored.nbytes // kind.nbytes, kind.nbytes)
    packed = mapped(stored.path, stored.offset, blocks, np.dtype(np.uint8))
    return unpacked(packed, stored.shape, kind)


# Writing a GGUF file with the `gguf` package, one tensor at a time. Does not know Llamas.

NUMBERS = {kind.name: number for number, kind in TYPES.items()}


def stream(
    path: Path,
    architecture: str,
    keys: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    kind: StoredType,
    report: Callable[[int], None],
) -> None:
    """Write a file; each tensor is read once, in order, and dropped.

    Args:
      kind: of tensors of two dims. Those of one are float32, and those whose rows are not whole
        blocks float16.
      report: is given the bytes of `tensors` written so far, after each.

    Raises:
      UserError: if the package is missing, or a number does not fit.
    """
    package = _package()
    writer = package.GGUFWriter(path, architecture)
    kinds = {name: _kind_of(tensor, kind) for name, tensor in tensors.items()}
    try:
        for key, value in keys.items():
            _add(writer, key, value)
        for name, tensor in tensors.items():
            number = package.GGMLQuantizationType(NUMBERS[kinds[name].name])
            nbytes = kinds[name].stored_bytes(tensor.shape)
            writer.add_tensor_info(name, tensor.shape, tensor.dtype, nbytes, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for name, tensor in tensors.items():
            writer.write_tensor_data(_bytes(name, tensor, kinds[name]))
            report(done := done + tensor.nbytes)
    finally:
        writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        message = 'writing GGUF needs the gguf package; run: pip install "llama_jax[gguf]"'
        raise UserError(message) from error
    return gguf


def _kind_of(tensor: Tensor, kind: StoredType) -> StoredType:
    if len(tensor.shape) == 1:
        return F32
    return F16 if tensor.shape[-1] % kind.count else kind


def _bytes(name: str, tensor: Tensor, kind: StoredType) -> np.ndarray:
    try:
        return stored(tensor.read(), kind)
    except OverflowError as error:
        message = f"{name} has a number that {kind.name} cannot hold; use --dtype float32"
        raise UserError(message) from error


def _add(writer: Any, key: str, value: Value) -> None:
    """Give the package a key, with the type that llama.cpp expects for such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        if not 0 <= value < 2**32:
            raise UserError(f"{key} = {value} does not fit into GGUF's 32 bits; make it smaller")
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        writer.add_array(key, value.tobytes() if value.dtype == np.uint8 else value.tolist())
    else:
        writer.add_array(key, value)
