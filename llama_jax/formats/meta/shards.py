"""The consolidated.NN.pth of a model that Meta cut for several devices, merged and cut again.

A tensor is cut along one dim or copied to every shard. Does not know what a model computes.
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
from llama_jax.formats.weights import Tensor

COUNTS = (1, 2, 4, 8)
SHARD = re.compile(r"consolidated\.([0-9]{2})\.pth")
PARAMS = "params.json"
PROBE = "layers.0.attention.wq.weight"  # its shape tells how many shards there should be
EMBEDDING = "tok_embeddings.weight"
DIMS = {  # along which a tensor is cut, by the last word of its name; others are copied
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}


def find(path: Path) -> tuple[list[Path], Path]:
    """The shards of a folder, or the one file itself, and the file of their params.

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
    beside = shards[0].with_suffix(".json")
    return shards, beside if beside.exists() else shards[0].with_name(PARAMS)


def merged(shards: list[Path], dim: int) -> dict[str, Tensor]:
    """The whole tensors of all shards, merged when read.

    Args:
      dim: width of the model, as its params say.

    Raises:
      UserError: if shards are missing, or are not parts of the same model.
    """
    parts = [torch_file.read(shards[0])]
    _require_all(shards, parts[0], dim)
    for shard in shards[1:]:
        parts.append(torch_file.read(shard))
        _require_alike(shards[0], parts[0], shard, parts[-1])
    return {
        name: _merged([part[name] for part in parts], _dim(name, tensor, len(parts), dim))
        for name, tensor in parts[0].items()
    }


def _require_all(shards: list[Path], first: Mapping[str, Tensor], dim: int) -> None:
    """`UserError` unless these are as many shards as the shape of a tensor in the first says."""
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


def _require_alike(one: Path, ours: Mapping[str, Tensor], other: Path, theirs: Mapping) -> None:
    """`UserError` unless two shards hold the same names, with the same shapes and dtypes."""
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


def _dim(name: str, part: Tensor, count: int, dim: int) -> int | None:
    """Along which dim `count` parts of a tensor lie, or None where all are the same."""
    if count == 1 or len(part.shape) != 2:
        return None
    # Llama 3 cuts the embedding into parts of the vocabulary, which keep their whole width.
    return 0 if name == EMBEDDING and part.shape[1] == dim else _cut_dim(name)


def _cut_dim(name: str) -> int | None:
    """Along which dim Meta cuts a tensor, or None where every shard has a copy."""
    return DIMS.get(name.removesuffix(".weight").split(".")[-1])


def _merged(parts: list[Tensor], along: int | None) -> Tensor:
    """One tensor out of its parts, of which only one at a time is mapped."""
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
    """The view of a shard's part of an array."""
    return array[(slice(None),) * along + (slice(number * size, (number + 1) * size),)]


def require_divisible(config: ModelConfig, shards: int) -> None:
    """`UserError` unless a model can be cut into so many shards."""
    if shards not in COUNTS:
        raise UserError(f"shards={shards} is not possible; expected 1, 2, 4 or 8")
    for name in ("num_kv_heads", "ffn_dim", "vocab_size"):  # what divides the rest
        if (size := getattr(config, name)) % shards:
            raise UserError(f"{name}={size} does not divide into {shards} shards; use fewer")


def write(
    folder: Path, tensors: Mapping[str, Tensor], count: int, report: Callable[[int], None]
) -> None:
    """Write all shards side by side, so that each tensor is read once."""
    done = 0
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(Writer(folder / f"consolidated.{number:02}.pth", described))
            for number in range(count)
            for described in [{name: _cut(name, t, count) for name, t in tensors.items()}]
        ]
        for name, tensor in tensors.items():
            array = tensor.read()
            along = _cut_dim(name)
            for number, writer in enumerate(writers):
                size = array.shape[along] // count if along is not None else 0
                writer.add(array if along is None else _part(array, along, number, size))
            del array
            report(done := done + tensor.nbytes)


def _cut(name: str, tensor: Tensor, count: int) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype of each shard's part of a tensor."""
    along = _cut_dim(name)
    shape = tuple(n // count if dim == along else n for dim, n in enumerate(tensor.shape))
    return shape, tensor.dtype
