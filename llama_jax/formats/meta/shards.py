"""Meta's consolidated.NN.pth: tensors split over several files, merged and split again.

A tensor is split along one dim, or copied to every shard.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.torch import reader as torch_file
from llama_jax.formats.torch.writer import Writer
from llama_jax.formats.weights import Tensor, find_file

COUNTS = (1, 2, 4, 8)
SHARD = re.compile(r"consolidated\.([0-9]{2})\.pth")
PARAMS = "params.json"
PROBE = "layers.0.attention.wq.weight"  # its shape shows the number of shards
EMBEDDING = "tok_embeddings.weight"
DIMS = {  # along which a tensor is split, by the last word of its name; others are copied
    "tok_embeddings": 1,
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


def find(path: Path) -> tuple[list[Path], Path]:
    """Return the shards of a folder, or a single file, and the file with their params.

    A folder without shards may hold a single .pth of another name.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder of Meta's or a .pth")
    files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
    shards = [file for file in files if SHARD.fullmatch(file.name)] or files
    if not shards:
        raise UserError(f"{path} holds no consolidated.00.pth; expected a folder of Meta's")
    if len(shards) > 1 and not SHARD.fullmatch(shards[0].name):
        raise UserError(f"{path} holds {len(shards)} .pth files; name one of them")
    folder = shards[0].parent
    if path.is_dir():
        for shard in shards:
            find_file(folder, shard.name)  # refuses links that leave the folder
    beside = find_file(folder, shards[0].with_suffix(".json").name)
    return shards, beside or find_file(folder, PARAMS) or folder / PARAMS


def merged(shards: list[Path], dim: int) -> dict[str, Tensor]:
    """Return the tensors of all shards, merged when read.

    Args:
      dim: of the model, from its params.

    Raises:
      UserError: if shards are missing, or are not of the same model.
    """
    parts = [torch_file.read(shards[0])]
    _check_complete(shards, parts[0], dim)
    for shard in shards[1:]:
        parts.append(torch_file.read(shard))
        _check_alike(shards[0], parts[0], shard, parts[-1])

    def merge(name: str, part: Tensor) -> Tensor:
        along = _split_dim(name) if len(parts) > 1 and len(part.shape) == 2 else None
        # Llama 3 splits the embedding along the vocabulary, so that its shards have all of `dim`.
        if along is not None and name == EMBEDDING and part.shape[1] == dim:
            along = 0
        return _merged([tensors[name] for tensors in parts], along)

    return {name: merge(name, part) for name, part in parts[0].items()}


def _check_complete(shards: list[Path], first: Mapping[str, Tensor], dim: int) -> None:
    """Refuse other shards than as many as the shape of a tensor in the first shows."""
    if PROBE not in first or len(first[PROBE].shape) != 2:
        raise UserError(f"{shards[0]} holds no {PROBE}; expected a Llama in Meta's own names")
    rows, columns = first[PROBE].shape
    count = dim // rows if rows else 0
    if columns != dim or count not in COUNTS or count * rows != dim:
        raise UserError(
            f"{shards[0]} has {PROBE} {[rows, columns]}, which dim={dim} in its params does not"
            " give in 1, 2, 4 or 8 shards; is this the right params.json?"
        )
    found = {int(match[1]) for file in shards if (match := SHARD.fullmatch(file.name))} or {0}
    missing, extra = set(range(count)) - found, found - set(range(count))
    if missing or extra:
        names = ", ".join(f"consolidated.{number:02}.pth" for number in sorted(missing or extra))
        raise UserError(
            f"{shards[0].parent}: the shapes and dim={dim} say {count} shards, and {names}"
            f" {'is missing' if missing else 'is not of them'}; give a folder with all of one model"
        )


def _check_alike(one: Path, ours: Mapping[str, Tensor], other: Path, theirs: Mapping) -> None:
    """Refuse shards with different names, shapes or dtypes."""
    for name in [*ours, *theirs]:
        said = [
            f"{list(part[name].shape)} of {part[name].dtype}" if name in part else "missing"
            for part in (ours, theirs)
        ]
        if said[0] != said[1]:
            raise UserError(
                f"{name} is {said[0]} in {one} but {said[1]} in {other.name}; expected the shards"
                " of one model"
            )


def _split_dim(name: str) -> int | None:
    """Return the dim along which Meta splits a tensor, or None if every shard has a copy."""
    return DIMS.get(name.removesuffix(".weight").split(".")[-1])


def _merged(parts: list[Tensor], along: int | None) -> Tensor:
    """Return one tensor made of parts, which are mapped one at a time."""
    if along is None:
        return parts[0]
    size = parts[0].shape[along]
    shape = tuple(n * len(parts) if dim == along else n for dim, n in enumerate(parts[0].shape))

    def read() -> np.ndarray:
        whole = np.empty(shape, parts[0].dtype)
        for number, part in enumerate(parts):
            _part(whole, along, number, size)[...] = part.read()
        return whole

    return Tensor(shape, parts[0].dtype, read)


def _part(array: np.ndarray, along: int, number: int, size: int) -> np.ndarray:
    """Return the view of a shard's part of an array."""
    return array[(slice(None),) * along + (slice(number * size, (number + 1) * size),)]


def check_divisible(config: ModelConfig, shards: int) -> None:
    """Raise `UserError` unless a model can be split into so many shards."""
    if shards not in COUNTS:
        raise UserError(f"shards={shards} is not possible; expected 1, 2, 4 or 8")
    for name in ("num_kv_heads", "ffn_dim", "vocab_size"):  # the other dims are multiples of these
        if (size := getattr(config, name)) % shards:
            raise UserError(f"{name}={size} does not divide into {shards} shards; use fewer")


def write(
    folder: Path, tensors: Mapping[str, Tensor], count: int, report: Callable[[int], None]
) -> None:
    """Write all shards side by side, so that each tensor is read once."""

    def part_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
        along = _split_dim(name)
        return tuple(n // count if dim == along else n for dim, n in enumerate(tensor.shape))

    described = {name: (part_shape(name, t), t.dtype) for name, t in tensors.items()}
    done = 0
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(Writer(folder / f"consolidated.{number:02}.pth", described))
            for number in range(count)
        ]
        for name, tensor in tensors.items():
            array, along = tensor.read(), _split_dim(name)
            for number, writer in enumerate(writers):
                size = array.shape[along] // count if along is not None else 0
                writer.add(array if along is None else _part(array, along, number, size))
            del array
            report(done := done + tensor.nbytes)
