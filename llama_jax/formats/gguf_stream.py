"""Writing a GGUF file with the `gguf` package, one tensor at a time. Does not know Llamas."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.gguf_blocks import F16, F32, TYPES, StoredType, stored
from llama_jax.formats.gguf_keys import Value
from llama_jax.formats.weights import Tensor

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
