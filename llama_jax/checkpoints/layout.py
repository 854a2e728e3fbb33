"""The files of a checkpoint, read and written array by array.

Orbax reads and writes whole trees, more than a conversion may hold in memory. The same files are
made here, so that either opens what the other wrote. A checkpoint is a folder named by its step,
with a folder for each item: arrays in an OCDBT store, one Zarr array per name, beside a `_METADATA`
that lists the names; JSON in a file `metadata`.
"""

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.errors import UsageError, UserError, reason, write_error

FLOATS = {
    np.dtype(np.float32): "<f4",
    np.dtype(np.float16): "<f2",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}
ZARR_NAMES = FLOATS | {np.dtype(np.int8): "|i1", np.dtype(np.uint8): "|u1"}
LARGEST_RATIO = 1000  # of an item's elements to its bytes: no weights compress like that
CHECKSUM = "checksum"  # key of an item's JSON
STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # the name of a checkpoint's folder
Shape = tuple[int, ...]


def finished_steps(folder: Path) -> list[int]:
    """Return the steps that a folder has checkpoints of, ascending."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(int(name) for name in names if STEP.fullmatch(name))


# ---- items with JSON ----


def with_checksum(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree that JSON can hold with a checksum of itself, for `read_json`."""
    return tree | {CHECKSUM: json_checksum(tree)}


def write_json(item: Path, tree: dict[str, Any]) -> None:
    """Create an item with JSON."""
    item.mkdir()
    (item / "metadata").write_text(json.dumps(with_checksum(tree)))


def read_json(item: Path) -> dict[str, Any]:
    """Return what an item with JSON holds, verified if it was written with a checksum.

    Raises:
      OSError, ValueError: when it is missing or damaged.
    """
    try:
        tree = json.loads((item / "metadata").read_bytes())
    except RecursionError:
        raise ValueError(f"{item.name} is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{item.name} is not a mapping")
    if (found := tree.pop(CHECKSUM, None)) and found != json_checksum(tree):
        raise ValueError(f"checksum of {item.name} differs")
    return tree


def json_checksum(tree: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON tree, in hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a small file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- items with arrays ----


def write_names(item: Path, shapes: Mapping[str, Shape]) -> None:
    """Write the list of an item's arrays that Orbax reads."""

    def entry(name: str, shape: Shape) -> dict[str, Any]:
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)}
        return {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value}

    tree = {
        "tree_metadata": {str((name,)): entry(name, shape) for name, shape in shapes.items()},
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (item / "_METADATA").write_text(json.dumps(tree))


def create_array(item: Path, name: str, shape: Shape, chunk: Shape, dtype: np.dtype) -> Any:
    """Create an array to write to with `array[...].write(part).result()`, best chunk by chunk.

    It is not compressed: weights hardly shrink, and slowly.
    """
    metadata = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk),
        "dtype": ZARR_NAMES[dtype],
        "order": "C",
        "dimension_separator": ".",
        "compressor": None,
        "fill_value": None,
        "filters": None,
    }
    return _open(item, name, metadata=metadata, create=True)


def open_array(item: Path, name: str, shape: Shape, dtype: np.dtype) -> Any:
    """Open an array to read from with `array[...].read().result()`.

    Raises:
      ConfigMismatch: when it has another shape.
      ValueError: when it is missing or has a dtype that `dtype_mismatch` names.
    """
    array = _open(item, name, open=True, fill_missing_data_reads=False)
    chunk = array.chunk_layout.read_chunk.shape
    require_shapes(item, {name: array.shape}, {name: shape})
    if why := dtype_mismatch(name, np.dtype(array.dtype.numpy_dtype), dtype):
        raise ValueError(why)
    if any(part > max(size, 1) for part, size in zip(chunk, shape)):
        raise ValueError(f"{name} is stored in chunks of {list(chunk)}, larger than the array")
    return array


def names(item: Path) -> list[str]:
    """Return the names of the arrays that an item holds.

    Raises:
      ValueError: when it is not an item with arrays.
    """
    import tensorstore as ts

    keys = ts.KvStore.open(_store(item)).result().list().result()
    return sorted(
        key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")
    )


def _open(item: Path, name: str, **spec: Any) -> Any:
    import tensorstore as ts

    store = _store(item) | {"path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": store, **spec}).result()


def _store(item: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{resolved(item)}/"}
    return {"driver": "ocdbt", "base": base}


# ---- checks ----


class ConfigMismatch(UserError):
    """A checkpoint's arrays are not those of the model that `config.json` describes."""


def require_shapes(item: Path, stored: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise `ConfigMismatch` unless an item's arrays have the expected names and shapes."""
    for name in {**expected, **stored}:
        found, wanted = (
            str(list(shapes[name])) if name in shapes else "missing"
            for shapes in (stored, expected)
        )
        if found != wanted:
            raise ConfigMismatch(
                f"checkpoint {item.parent} does not fit its config.json: {item.name}.{name} is"
                f" {found} in the checkpoint and {wanted} in the config's model; restore the"
                " config.json it was saved with"
            )


def dtype_mismatch(name: str, found: np.dtype, expected: np.dtype) -> str:
    """Return what is wrong with an array's dtype; floats of any width stand for each other."""
    known = [expected] if expected.kind in "iu" else list(FLOATS)
    return "" if found in known else f"{name} is {found}, expected {' or '.join(map(str, known))}"


def require_plausible(item: Path, elements: int) -> None:
    """Raise `UserError` if a folder is far too small to hold so many elements.

    Raises:
      OSError: when it cannot be listed.
    """
    os.scandir(item).close()  # `rglob` passes over what may not be listed
    size = sum(path.stat().st_size for path in item.rglob("*") if path.is_file())
    if size * LARGEST_RATIO < elements:
        raise UserError(
            f"{item} has {size:,} bytes, which cannot hold the {elements:,} numbers of its config;"
            " copy it again"
        )


def refuse_links(checkpoint: Path) -> None:
    """Raise `UserError` if a checkpoint contains links, which may lead anywhere."""
    if any(entry.is_symlink() for entry in checkpoint.rglob("*")):
        raise UserError(f"checkpoint {checkpoint} contains links, which are not followed")


def resolved(folder: Path) -> Path:
    """Return a folder's absolute path, for TensorStore and Orbax.

    Raises:
      UsageError: if TensorStore would take it for another, or cannot take it at all.
    """
    folder = folder.resolve()
    name = folder.as_posix()
    if "\\" in name:  # TensorStore reads and writes `a/b` instead of `a\b`
        raise UsageError(f"{folder} has a backslash in its name; choose another folder")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name!r} is not a name in UTF-8; choose another folder") from None
    return folder


# ---- Orbax ----


def orbax_path(folder: Path) -> Any:
    """Return a folder's absolute path for Orbax, in which no character is special.

    Orbax finds its own files with `glob`, and in the paths of etils the name of the folder is part
    of the pattern: in `run[1]` nothing matches, and a checkpoint is written without its arrays.
    """
    from etils import epath

    folder = resolved(folder)
    base: Any = type(epath.Path(folder))

    class LiteralPath(base):
        def glob(self, pattern: str) -> Iterator[Any]:
            return map(type(self), Path(self).glob(pattern))

    return LiteralPath(folder)


@functools.cache
def quiet_orbax() -> None:
    """Keep Orbax from printing tracebacks of what is raised anyway, for the rest of the process.

    Several of its threads log the same error, and each read or write that it abandons after one
    prints a traceback or a warning when it is collected, at any time later. So does asyncio for it.
    """

    def is_news(record: logging.LogRecord) -> bool:
        text = logging.Formatter().format(record)  # with the traceback
        return "never retrieved" not in text or not re.search("orbax|OCDBT|zarr", text)

    logging.getLogger("asyncio").addFilter(is_news)
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report, is_coroutine = sys.unraisablehook, inspect.iscoroutine

    def hook(unraisable: Any) -> None:
        try:  # when the interpreter exits, anything may be gone
            is_closed = "Event loop is closed" in str(unraisable.exc_value)
            is_abandoned = is_closed or is_coroutine(unraisable.object)
        except Exception:
            is_abandoned = False
        if not is_abandoned:
            report(unraisable)

    sys.unraisablehook = hook


# ---- errors in one line ----


def damaged(checkpoint: Path, why: Exception | str) -> UserError:
    """Return the error for a checkpoint that cannot be read."""
    why = reason(why) if isinstance(why, Exception) else why
    if why == os.strerror(errno.EACCES):
        return UserError(f"checkpoint {checkpoint} cannot be read: {why}; ask for access to it")
    return UserError(f"checkpoint {checkpoint} is damaged: {why}")


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise `UserError` where TensorStore cannot write what belongs to `path` in the block."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise write_error(path.name, error) from error
