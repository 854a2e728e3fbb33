"""The tensors of a model in one GGUF file or several, read and written one at a time.

The `gguf` package dequantises every block type that it knows, writes headers, and quantises Q8_0.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as BlockType

from llama_jax.errors import UserError
from llama_jax.formats.gguf.header import Header, StoredTensor, Value, read_header
from llama_jax.formats.weights import DTYPES, Tensor, is_finite, mapped

COUNT, TOTAL = "split.count", "split.tensors.count"
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
PLAIN = {  # types without blocks
    BlockType.F32: DTYPES["float32"],
    BlockType.F16: DTYPES["float16"],
    BlockType.BF16: DTYPES["bfloat16"],
}
CHUNK = 2**20  # numbers converted at a time, so that temporaries stay small


def read_headers(path: Path) -> Header:
    """Return the keys of the first file of a model, with the tensors of all its files.

    Raises:
      UserError: if `path` is not the first, or the files are broken or not one model.
    """
    first = read_header(path)
    count = first.keys.get(COUNT, int, 1)
    if count <= 1:
        return first
    match = NUMBERED.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        expected = f"name the first, which ends in -00001-of-{count:05}.gguf"
        raise UserError(f"{path} is one of {count} files of a model; {expected}")
    tensors = dict(first.tensors)
    names = [f"{match[1]}-{number:05}-of-{count:05}.gguf" for number in range(2, count + 1)]
    parts = [path.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"{path} is one of {count} files of a model, of which {missing[0]}{more} is missing;"
            " download all of them into one folder"
        )
    for part in parts:
        for name, tensor in read_header(part).tensors.items():
            if name in tensors:
                raise UserError(f"{part} holds {name}, which {tensors[name].path} holds as well")
            tensors[name] = tensor
    total = first.keys.get(TOTAL, int, len(tensors))
    if total != len(tensors):
        raise UserError(f"{path} and its parts hold {len(tensors)} tensors; {TOTAL} says {total}")
    return Header(first.keys, tensors)


def lazy_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Return the tensors; those in blocks are dequantised to float32 when they are read.

    Raises:
      UserError: if some have a type that the `gguf` package cannot dequantise.
    """
    unreadable = [name for name, tensor in stored.items() if not _is_readable(tensor)]
    if unreadable:
        kinds = sorted({_type_name(stored[name].type_number) for name in unreadable})
        more = f" and {len(unreadable) - 1} more" if unreadable[1:] else ""
        raise UserError(
            f"{path} stores {unreadable[0]}{more} as {', '.join(kinds)}, which cannot be read;"
            " expected floats or blocks that the gguf package dequantises, such as Q4_K"
        )
    return {name: _lazy(tensor) for name, tensor in stored.items()}


def _is_readable(tensor: StoredTensor) -> bool:
    if tensor.block is None:
        return False
    try:  # the package has no list of what it dequantises; one block costs nothing
        gguf.dequantize(np.zeros((1, tensor.block[1]), np.uint8), BlockType(tensor.type_number))
    except NotImplementedError:
        return False
    return True


def _type_name(number: int) -> str:
    return BlockType(number).name if number in list(BlockType) else f"type {number}"


def _lazy(tensor: StoredTensor) -> Tensor:
    kind, shape = BlockType(tensor.type_number), tensor.shape
    if kind in PLAIN:
        return mapped(tensor.path, tensor.offset, shape, PLAIN[kind])
    assert tensor.block is not None
    count, size = tensor.block
    rows = tensor.nbytes // (shape[-1] // count * size)
    packed = mapped(tensor.path, tensor.offset, (rows, tensor.nbytes // rows), np.dtype(np.uint8))

    @np.errstate(all="ignore")  # scales may be NaN or infinite, and then so are the numbers
    def read() -> np.ndarray:
        bytes_RB, numbers_RN = packed.read(), np.empty((rows, shape[-1]), np.float32)
        step = max(1, CHUNK // shape[-1])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            numbers_RN[part] = gguf.dequantize(bytes_RB[part], kind)
        return numbers_RN.reshape(shape)

    return Tensor(shape, DTYPES["float32"], read)


def write_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Value],
    tensors: Mapping[str, Tensor],
    kind: BlockType,
    report: Callable[[int], None],
) -> None:
    """Write a file; each tensor is read once, in order, and dropped.

    Args:
      kind: of tensors of two dims. Those of one are F32, and those whose rows are not whole blocks
        BF16 if they are bfloat16, else F16.
      report: called with the bytes of `tensors` written so far, after each.

    Raises:
      UserError: if a number does not fit into its type.
    """
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {name: _type_of(tensor, kind) for name, tensor in tensors.items()}
    try:
        for key, value in keys.items():
            _add(writer, key, value)
        for name, tensor in tensors.items():
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
            writer.add_tensor_info(
                name, tensor.shape, tensor.dtype, int(np.prod(shape, dtype=np.int64)), kinds[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for name, tensor in tensors.items():
            writer.write_tensor_data(_encoded(name, tensor.read(), kinds[name]))
            report(done := done + tensor.nbytes)
    finally:
        writer.close()


def _type_of(tensor: Tensor, kind: BlockType) -> BlockType:
    if len(tensor.shape) == 1:
        return BlockType.F32
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return BlockType.BF16 if tensor.dtype == PLAIN[BlockType.BF16] else BlockType.F16
    return kind


@np.errstate(all="ignore")  # what does not fit is checked afterwards
def _encoded(name: str, array: np.ndarray, kind: BlockType) -> np.ndarray:
    """Return an array as the bytes that are stored."""
    if kind in PLAIN:
        encoded = array.astype(PLAIN[kind], copy=False)
        fits = kind != BlockType.F16 or array.dtype == encoded.dtype or is_finite(encoded)
    else:
        encoded = _q8_0(array)
        scales = encoded.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])[:, :2]
        fits = is_finite(np.ascontiguousarray(scales).view(np.float16))
    if not fits:
        raise UserError(f"{name} has a number that {kind.name} cannot hold; use --dtype float32")
    return encoded.reshape(-1).view(np.uint8)


def _q8_0(array: np.ndarray) -> np.ndarray:
    """Return rows of whole blocks as Q8_0, uint8."""
    shape = gguf.quant_shape_to_byte_shape(array.shape, BlockType.Q8_0)
    encoded, step = np.empty(shape, np.uint8), max(1, CHUNK // array.shape[-1])
    for start in range(0, len(array), step):
        rows = array[start : start + step].astype(np.float32)
        rows[np.abs(rows) < 1e-30] = 0  # stored as 0 anyway, but their inverse would overflow
        encoded[start : start + step] = gguf.quantize(rows, BlockType.Q8_0)
    return encoded


def _add(writer: Any, key: str, value: Value) -> None:
    """Add a key with the type that llama.cpp expects for such a value."""
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
