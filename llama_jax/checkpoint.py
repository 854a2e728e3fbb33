"""Checkpoints on disk: the only file that knows Orbax.

A checkpoint is a step's folder with three items: `model` and `optimizer`, flat mappings from a
dotted name to an array, and `meta`, JSON with a checksum of every array. Orbax makes a folder
appear whole or not at all; that its bytes are still what was written, the checksums tell.
"""

import dataclasses
import functools
import inspect
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.names import named_leaves
from llama_jax.run_folder import require_space

Tree = TypeVar("Tree")
Report = Callable[[str], None]

ITEMS = ("model", "optimizer")
STEP = re.compile(r"0|[1-9][0-9]{0,8}")  # what a checkpoint's folder is called


def _renamed(tree: Tree, leaves: dict[str, Any]) -> Tree:
    """A tree of the same structure with leaves looked up by name."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A sum of each array's bits modulo 2³², weighted by place, whatever its sharding."""

    def checksum(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.bool:
            array = array.astype(jnp.uint8)
        width = jnp.dtype(array.dtype).itemsize * 8
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, leaves)


def _sums(leaves: dict[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in jax.device_get(_checksums(leaves)).items()}


def finished_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; anything that is not one is ignored."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    return sorted(int(name) for name in names if STEP.fullmatch(name))


class CheckpointWriter:
    """Writes checkpoints in the background; keeps the last few and the best.

    An error of the disk shows at the next `save` or `wait`, as a `UserError`.
    """

    def __init__(self, folder: Path, keep_last: int):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        best = policies.BestN(get_metric_fn=_validation_loss, reverse=True, n=1)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep_last), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            best_fn=_validation_loss,  # without it Orbax forgets metrics when the process ends
            cleanup_tmp_directories=True,
            create=False,
        )
        self._folder = folder
        self._args = ocp.args
        with _plain_errors(folder):
            self._manager = ocp.CheckpointManager(
                folder.resolve(), options=options, item_names=(*ITEMS, "meta")
            )

    def save(
        self, step: int, model: Llama, optimizer: Any, meta: dict[str, Any], validation_loss: float
    ) -> None:
        """Begin to write a checkpoint; its arrays may be donated as soon as this returns.

        `validation_loss` is in nats per token, or not finite when this step was not validated.
        """
        items = {"model": named_leaves(model), "optimizer": named_leaves(optimizer)}
        require_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
        sums = {item: _sums(leaves) for item, leaves in items.items()}
        loss = validation_loss if validation_loss < float("inf") else float("inf")  # NaN is no best
        with _plain_errors(self._folder):
            self._manager.save(
                step,
                args=self._args.Composite(
                    **{item: self._args.StandardSave(leaves) for item, leaves in items.items()},
                    meta=self._args.JsonSave(meta | {"checksums": sums}),
                ),
                metrics={"validation_loss": loss},
                force=True,
            )

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        with _plain_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written and let go."""
        with _plain_errors(self._folder):
            self._manager.close()  # waits first


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


class _plain_errors:
    """Turns whatever Orbax raises into one line."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(
                f"a checkpoint could not be written to {self._folder}: {_reason(error)};"
                " older checkpoints are intact"
            ) from error


def _reason(error: Exception) -> str:
    """The first telling line of an error of several screens."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


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

    A damaged one is reported in a line and passed over for the one before it.

    Args:
      wanted: by item, a tree of `jax.ShapeDtypeStruct` with shardings.
      report: gets a line for each damaged checkpoint.
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
            restored = restore(path, wanted)
        except UserError as error:
            report(f"{error}; falling back to the one before it")
            damaged.append(path)
            continue
        if set_aside:
            for path in damaged:
                _set_aside(path)
        return restored
    if steps:
        raise UserError(f"none of the checkpoints in {folder} can be read; see the lines above")
    return None


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint; nothing is deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    shutil.move(path, target)


def restore(path: Path, wanted: dict[str, Any]) -> Restored:
    """One checkpoint, its shapes, types and checksums verified.

    Raises:
      UserError: naming what is wrong with it.
    """
    if any(entry.is_symlink() for entry in path.rglob("*")):
        raise UserError(f"checkpoint {path} contains links, which are not followed")
    try:
        return _read(path, wanted)
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
    _silence_abandoned_reads()
    raise UserError(f"checkpoint {path} is damaged: {reason}")


def _read(path: Path, wanted: dict[str, Any]) -> Restored:
    """What `restore` returns, or whatever Orbax raises."""
    import orbax.checkpoint as ocp

    trees: dict[str, Any] = {}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore((path / "meta").resolve())
    with ocp.StandardCheckpointer() as reader:
        for item, tree in wanted.items():
            leaves = reader.restore((path / item).resolve(), named_leaves(tree))
            _verify(path, item, leaves, meta["checksums"][item])
            trees[item] = _renamed(tree, leaves)
    return Restored(int(path.name), trees, meta)


@functools.cache
def _silence_abandoned_reads() -> None:
    """Orbax drops reads that it began when one fails; each would print a traceback much later."""
    tell = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        is_closed = "Event loop is closed" in str(unraisable.exc_value)
        if not (inspect.iscoroutine(unraisable.object) or is_closed):
            tell(unraisable)

    sys.unraisablehook = hook


def _verify(path: Path, item: str, leaves: dict[str, Any], expected: dict[str, int]) -> None:
    """Refuse arrays whose bits are not those that were saved."""
    for name, value in _sums(leaves).items():
        if value != expected.get(name):
            raise UserError(f"checkpoint {path} is damaged: checksum of {item}.{name} differs")


def checkpoint_paths(path: Path) -> Iterator[Path]:
    """The checkpoints that a user means by a path, newest first: one step, or all of a folder."""
    is_step = path.name.isdigit() and (path / "meta").exists()
    steps = [path] if is_step else [path / str(step) for step in reversed(finished_steps(path))]
    yield from steps
