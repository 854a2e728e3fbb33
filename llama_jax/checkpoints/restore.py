"""Restore checkpoints: the step that a path names or the newest intact one, every bit verified."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from llama_jax.checkpoints.layout import (
    STEP,
    ConfigMismatch,
    damaged,
    finished_steps,
    orbax_path,
    quiet_orbax,
    read_json,
    refuse_links,
    require_shapes,
)
from llama_jax.checkpoints.save import checksums
from llama_jax.distributed.consistency import gathered, together
from llama_jax.errors import UserError, is_out_of_memory, warn
from llama_jax.model.parameters import named_leaves

Content = TypeVar("Content")
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    trees: dict[str, Any]  # by item, with the structure that was passed
    meta: dict[str, Any]


# ---- which step ----


def folder_and_step(path: str | Path) -> tuple[Path, Path | None]:
    """Return the folder of checkpoints that a path means, and the step's folder if it names one."""
    path = Path(path).expanduser()
    step = path.absolute()  # "." has no name of its own
    is_step = bool(STEP.fullmatch(step.name)) and (step / "model").is_dir()
    return (step.parent, step) if is_step else (path, None)


def read_checkpoint(folder: Path, step: Path | None, read: Callable[[Path], Content]) -> Content:
    """Return what `read` makes of a step, or of a folder's newest intact one if it is None.

    Raises:
      UserError: when there is none.
    """
    content = read(step) if step else newest_intact(folder, read, report=warn)
    if content is None:
        raise UserError(
            f"{folder} has no finished checkpoint; train until the first is saved, or name another"
        )
    return content


def newest_intact(
    folder: Path, read: Callable[[Path], Content], report: Report, set_aside: bool = False
) -> Content | None:
    """Return what `read` makes of the newest intact checkpoint; None if the folder has none at all.

    A damaged one is reported in a line, and the one before it is read.

    Args:
      read: a function of a step's folder that raises `UserError` when it is damaged.
      set_aside: rename damaged ones once an intact one is found, so that their steps can be saved
        again.

    Raises:
      UserError: when there are checkpoints and none of them is intact.
    """
    steps = finished_steps(folder)
    failed: dict[Path, str] = {}
    mismatches = 0
    for step in reversed(steps):
        path = folder / str(step)
        try:
            content = read(path)
        except UserError as error:
            failed[path] = str(error)  # the error itself would keep alive what was read
            mismatches += isinstance(error, ConfigMismatch)
            continue
        for path, why in failed.items():
            report(f"{why}; falling back to step {step}")
            if set_aside:
                _set_aside(path)
        return content
    if not steps:
        return None
    if finished_steps(folder) != steps:  # a run that goes on has replaced them meanwhile
        return newest_intact(folder, read, report, set_aside)
    if mismatches == len(steps) or len(steps) == 1:  # it is one mistake
        raise UserError(next(iter(failed.values())))
    for why in failed.values():
        report(why)
    raise UserError(f"none of the checkpoints in {folder} can be read; see the lines above")


def _set_aside(path: Path) -> None:
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    shutil.move(path, target)


# ---- its arrays and metadata ----


def restore_newest(
    folder: Path, items: dict[str, Any], report: Report, set_aside: bool = False
) -> Restored | None:
    """Return the newest intact checkpoint, the same on every process; None if there is none at all.

    Args:
      items: as for `restore`.
      report, set_aside: as for `newest_intact`.

    Raises:
      UserError: when there are checkpoints and none of them is intact.
    """
    set_aside = set_aside and jax.process_index() == 0
    restored = newest_intact(folder, lambda path: restore(path, items), report, set_aside)
    gathered("")  # no process looks at the folder before process 0 has renamed what is damaged
    return restored


def restore(path: Path, items: dict[str, Any]) -> Restored:
    """Return one checkpoint, its shapes and checksums verified.

    Args:
      items: by name, a tree of `jax.ShapeDtypeStruct` with shardings. Their dtypes do not matter:
        each array keeps the one it is stored in.

    Raises:
      UserError: naming what is wrong with it.
    """
    with together():
        restored = _read(path, items)
    for item in items:
        expected = restored.meta["checksums"][item]
        for name, value in checksums(named_leaves(restored.trees[item])).items():
            if value != expected.get(name):
                raise damaged(path, f"checksum of {item}.{name} differs")
    return restored


def _read(path: Path, items: dict[str, Any]) -> Restored:
    """Return a checkpoint, unverified; each process reads its shards and waits for no other."""
    refuse_links(path)
    quiet_orbax()
    try:
        return _read_with_orbax(path, items)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # nothing is wrong with the checkpoint
            raise
        complaint = damaged(path, error)
    raise complaint  # out here it has no cause, whose frames would keep alive what was read


def stored_arrays(item: Path) -> dict[str, Any]:
    """Return what Orbax knows of the arrays of an item by name: their shapes and dtypes."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointHandler().metadata(orbax_path(item)).tree


def _read_with_orbax(path: Path, items: dict[str, Any]) -> Restored:
    import orbax.checkpoint as ocp

    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    trees, meta = {}, read_json(path / "meta")
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
        for item, tree in items.items():
            place, leaves = orbax_path(path / item), named_leaves(tree)
            stored = stored_arrays(place)
            shapes = [{name: x.shape for name, x in tree.items()} for tree in (stored, leaves)]
            require_shapes(place, *shapes)
            leaves = {name: leaf.update(dtype=stored[name].dtype) for name, leaf in leaves.items()}
            arrays = reader.restore(place, leaves)
            in_order = [arrays[name] for name in leaves]
            trees[item] = jax.tree.unflatten(jax.tree.structure(tree), in_order)
            meta["checksums"][item]  # an item without them is damaged
    return Restored(int(path.name), trees, meta)
