"""The steps of a checkpoint folder: which there are, which one a path means, which is whole.

Knows their names and the order to try them in, not what lies in them.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llama_jax.errors import UserError

Content = TypeVar("Content")
STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # what a checkpoint's folder is called


def finished_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; anything that is not one is ignored."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(int(name) for name in names if STEP.fullmatch(name))


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
    damaged: list[Path] = []
    for step in reversed(steps):
        path = folder / str(step)
        try:
            content = read(path)
        except UserError as error:
            if len(steps) == 1:
                raise
            report(f"{error}; falling back to the one before it")
            damaged.append(path)
            continue
        if set_aside:
            for path in damaged:
                _set_aside(path)
        return content
    if steps:
        raise UserError(f"none of the checkpoints in {folder} can be read; see the lines above")
    return None


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint; nothing is deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    shutil.move(path, target)
