"""A model's tensors in one GGUF file, or in several that its name counts."""

import re
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.gguf_blocks import TYPES, type_name, unpacked
from llama_jax.formats.gguf_header import Header, Stored, scan
from llama_jax.formats.mapped import mapped
from llama_jax.formats.weights import Tensor

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
        for name, stored in scan(part).tensors.items():
            if name in tensors:
                raise UserError(f"{part} holds {name}, which {tensors[name].path} holds as well")
            tensors[name] = stored
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
