"""Files that `torch.load` reads, written without torch and tensor by tensor."""

import contextlib
import io
import math
import struct
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama_jax.formats.torch.reader import LOCAL_HEADER, STORAGES, c_strides

ALIGNMENT = 64  # bytes; where torch puts each storage in a file
MAX_PLAIN = 2**30  # bytes; larger entries get the 64-bit form of a zip
WIDE = 20  # bytes that it adds to an entry's header
PADDING = b"FB"  # the kind of the extra field that pads a header, as torch's
Description = tuple[tuple[int, ...], np.dtype]  # shape and dtype


class Writer:
    """A new file: its tensors are described at the start, then added in the same order."""

    def __init__(self, path: Path, described: Mapping[str, Description]) -> None:
        self.described = list(described.values())
        self.added = 0
        self.folder = path.stem or "archive"
        self.file = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED)
        self._entry("data.pkl", pickled(described))
        self._entry("byteorder", b"little")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None
    ) -> None:
        with contextlib.closing(self.file):
            if kind is None:
                assert self.added == len(self.described), "not all tensors were added"
                self._entry("version", b"3\n")

    def add(self, array: np.ndarray) -> None:
        """Write the next tensor."""
        assert (array.shape, array.dtype) == self.described[self.added], "not the next tensor"
        numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._entry(f"data/{self.added}", numbers.data)
        self.added += 1

    def _entry(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self.folder}/{name}")
        info.file_size = len(data)
        is_wide = len(data) > MAX_PLAIN
        header = LOCAL_HEADER + len(info.filename.encode()) + WIDE * is_wide
        assert self.file.fp is not None
        padding = -(self.file.fp.tell() + header + 4) % ALIGNMENT
        info.extra = PADDING + struct.pack("<H", padding) + bytes(padding)
        with self.file.open(info, "w", force_zip64=is_wide) as entry:
            entry.write(data)


def pickled(described: Mapping[str, Description]) -> bytes:
    """Return the pickle of a dict of tensors, each with a storage of its own."""
    storages = {dtype: name for name, dtype in STORAGES.items()}
    out = io.BytesIO()
    out.write(b"\x80\x02}(")
    for number, (name, (shape, dtype)) in enumerate(described.items()):
        out.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        out.write(_text("storage") + f"ctorch\n{storages[dtype]}Storage\n".encode())
        out.write(_text(str(number)) + _text("cpu") + _number(math.prod(shape)))
        out.write(b"tQ" + _number(0) + _numbers(shape) + _numbers(c_strides(shape)))
        out.write(b"\x89ccollections\nOrderedDict\n)RtR")  # requires_grad=False, no hooks
    out.write(b"u.")
    return out.getvalue()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
