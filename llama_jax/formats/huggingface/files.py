"""The files of a Hugging Face folder: found without leaving it, and their tensors gathered.

Knows safetensors alone or in shards with an index. Does not know what the tensors mean.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.formats.huggingface import safetensors as safetensors_file
from llama_jax.formats.json_files import read_object, shown, write_object
from llama_jax.formats.weights import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BARE_NAME = re.compile(r"[\w. -]{1,200}\.safetensors", re.ASCII)
MOST_SHARDS = 10_000


def find(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, or nothing.

    A link counts only inside the cache that huggingface_hub keeps, where
    `models--x/snapshots/y/config.json` points into `models--x/blobs`. Any other link leads to
    what the folder's owner did not hand over.

    Raises:
      UserError: if it is something else than a file, or a link to elsewhere.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    if not path.is_file():
        raise UserError(f"{path} is not a file; copy the folder again")
    real, home = path.resolve(), folder.resolve()
    if real.parent == home or real.parent == _blobs(home):
        return path
    target = f"to {str(real)!r}"
    raise UserError(f"{path} is a link that leaves its folder, {target}; put the file itself there")


def _blobs(home: Path) -> Path | None:
    """Where a snapshot in huggingface_hub's cache keeps its contents."""
    snapshots = home.parent
    is_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent / "blobs" if is_cache else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors, promised, by name.

    Raises:
      UserError: one line, if there are none, or an index and its shards disagree.
    """
    if single := find(folder, SINGLE):
        return safetensors_file.read(single)[0]
    index = find(folder, INDEX)
    if index is None:
        raise UserError(_no_tensors(folder))
    places = _weight_map(index)
    listed = collections.defaultdict(set)
    for name, home in places.items():
        listed[home].add(name)
    tensors: dict[str, Tensor] = {}
    for path in _shards(folder, index, set(listed)):
        shard, _ = safetensors_file.read(path)
        if twice := tensors.keys() & shard.keys():
            raise UserError(f"{path} and an earlier shard both hold {_some(twice)}; expected one")
        if absent := listed[path.name] - shard.keys():
            raise UserError(f"{path} lacks {_some(absent)}, which {INDEX} says it holds")
        tensors |= shard
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The shard's name of each tensor, a bare file name."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: weight_map is {shown(places)}; expected a file name by tensor")
    for name in places.values():
        if not isinstance(name, str) or not BARE_NAME.fullmatch(name):
            expected = "expected the bare name of a .safetensors file beside it"
            raise UserError(f"{index}: weight_map names the file {shown(name)}; {expected}")
    return places


def _shards(folder: Path, index: Path, names: set[str]) -> list[Path]:
    """The paths of all shards, in order."""
    if len(names) > MOST_SHARDS:
        raise UserError(f"{index} names {len(names):,} files; expected at most {MOST_SHARDS:,}")
    paths = {name: find(folder, name) for name in sorted(names)}
    if missing := [name for name, path in paths.items() if path is None]:
        raise UserError(
            f"{folder} lacks {_some(missing)} of the {len(names)} shards that {INDEX} names;"
            " download them too"
        )
    return [path for path in paths.values() if path is not None]


def _no_tensors(folder: Path) -> str:
    if find(folder, "pytorch_model.bin") or find(folder, "pytorch_model.bin.index.json"):
        return (
            f"{folder} has only pytorch_model.bin, which may hold code; load it in transformers"
            " and save it again with save_pretrained, which writes safetensors"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with a model's safetensors"


def _some(names: Iterable[str]) -> str:
    """The first of names and how many more."""
    first, *rest = sorted(names)
    return shown(first) + (f" and {len(rest)} more" if rest else "")


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], largest: float, report: Callable[[int], None]
) -> None:
    """One file, or shards of at most `largest` bytes each (but one tensor) and their index.

    Args:
      report: called with the bytes of tensors written so far.
    """
    shards = _packed(tensors, largest)
    if len(shards) == 1:
        safetensors_file.write(folder / SINGLE, shards[0], report=report)
        return
    places: dict[str, str] = {}
    before = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        report_more = functools.partial(_report_sum, report, before)
        safetensors_file.write(folder / name, shard, report=report_more)
        places |= dict.fromkeys(shard, name)
        before += sum(tensor.nbytes for tensor in shard.values())
    write_object(folder / INDEX, {"metadata": {"total_size": before}, "weight_map": places})


def _report_sum(report: Callable[[int], None], before: int, done: int) -> None:
    report(before + done)


def _packed(tensors: Mapping[str, Tensor], largest: float) -> list[dict[str, Tensor]]:
    """Tensors in order, in as few portions as their order allows."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > largest:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
