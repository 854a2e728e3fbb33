"""The steps of a checkpoint folder: which there are, which one a path means, which is whole.

Knows their names and the order to try them in, not what lies in them.
"""

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
from llama_jax.errors import UserError, is_out_of_memory
from llama_jax.model.parameters import named_leaves

Content = TypeVar("Content")


def folder_and_step(path: str | Path) -> tuple[Path, Path | None]:
    """What a path means: a folder of checkpoints, and one of its steps if it names one."""
    path = Path(path).expanduser()
    step = path.absolute()  # "." has no name of its own
    is_step = bool(STEP.fullmatch(step.name)) and (step / "model").is_dir()
    return (step.parent, step) if is_step else (path, None)


def newest_whole(
    folder: Path,
    read: Callable[[Path], Content],
    report: Callable[[str], None],
    set_aside: bool = False,
) -> Content | None:
    """What is read from the newest checkpoint that is whole; None when the folder has none at all.

    A damaged one is reported in a line and passed over for the one before it.

    Args:
      read: reads a step's folder, or raises `UserError` when it is damaged.
      set_aside: rename the damaged ones once a whole one is found, so that their steps can be
        written again.

    Raises:
      UserError: when there are checkpoints and none of them is whole.
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
    if mismatches == len(steps) or len(steps) == 1:  # it is one mistake
        raise UserError(next(iter(failed.values())))
    for why in failed.values():
        report(why)
    raise UserError(f"none of the checkpoints in {folder} can be read; see the lines above")


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint; nothing is deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    shutil.move(path, target)


# Reading a step: its trees and its metadata, every bit verified. `checkpoints.save` writes them.

Tree = TypeVar("Tree")
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    trees: dict[str, Any]  # by item, shaped like the trees asked for
    meta: dict[str, Any]


def restore_newest(
    folder: Path, wanted: dict[str, Any], report: Report, set_aside: bool = False
) -> Restored | None:
    """The newest checkpoint that is whole, or None when the folder has none at all.

    Args:
      wanted: by item, a tree of `jax.ShapeDtypeStruct` with shardings.
      report, set_aside: see `newest_whole`.

    Raises:
      UserError: when there are checkpoints and none of them is whole.
    """
    is_first = jax.process_index() == 0
    restored = newest_whole(
        folder, lambda path: restore(path, wanted), report, set_aside and is_first
    )
    gathered("")  # nobody looks at the folder before process 0 has set aside what is damaged
    return restored


def restore(path: Path, wanted: dict[str, Any]) -> Restored:
    """One checkpoint, its shapes and checksums verified.

    Args:
      wanted: by item, a tree of `jax.ShapeDtypeStruct` with shardings. Its dtypes do not matter:
        each array keeps the one it is stored in.

    Raises:
      UserError: naming what is wrong with it.
    """
    with together():
        restored = _read(path, wanted)
    for item in wanted:
        _verify(path, item, named_leaves(restored.trees[item]), restored.meta["checksums"][item])
    return restored


def _read(path: Path, wanted: dict[str, Any]) -> Restored:
    """What `restore` returns, unverified; each process reads its part and waits for no other."""
    refuse_links(path)
    quiet_orbax()
    try:
        return _read_with_orbax(path, wanted)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # nothing is wrong with the checkpoint
            raise
        complaint = damaged(path, error)
    raise complaint  # out here it has no cause, whose frames would hold what was read


def _read_with_orbax(path: Path, wanted: dict[str, Any]) -> Restored:
    """What `_read` returns, or whatever Orbax raises."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    trees: dict[str, Any] = {}
    meta = read_json(path / "meta")
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
        for item, tree in wanted.items():
            place, leaves = orbax_path(path / item), named_leaves(tree)
            stored = ocp.StandardCheckpointHandler().metadata(place).tree
            shapes = {name: leaf.shape for name, leaf in leaves.items()}
            require_shapes(place, {n: leaf.shape for n, leaf in stored.items()}, shapes)
            leaves = {name: leaf.update(dtype=stored[name].dtype) for name, leaf in leaves.items()}
            trees[item] = _renamed(tree, reader.restore(place, leaves))
            meta["checksums"][item]  # an item without them is damaged
    return Restored(int(path.name), trees, meta)


def _renamed(tree: Tree, leaves: dict[str, Any]) -> Tree:
    """A tree of the same structure with leaves looked up by name."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )


def _verify(path: Path, item: str, leaves: dict[str, Any], expected: dict[str, int]) -> None:
    """Refuse arrays whose bits are not those that were saved."""
    for name, value in checksums(leaves).items():
        if value != expected.get(name):
            raise damaged(path, f"checksum of {item}.{name} differs")
