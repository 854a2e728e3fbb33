"""Whole checkpoints, written and read: the only file that knows Orbax.

A checkpoint is a step's folder with three items: `model` and `optimizer`, flat mappings from a
dotted name to an array, and `meta`, JSON with a checksum of every array. Orbax makes a folder
appear whole or not at all; that its bytes are still what was written, the checksums tell.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from llama_jax.checkpoints.checksums import checksums
from llama_jax.checkpoints.layout import damaged, first_line, refuse_links
from llama_jax.checkpoints.run_folder import require_space
from llama_jax.checkpoints.steps import newest_whole
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.names import named_leaves
from llama_jax.out_of_memory import is_out_of_memory
from llama_jax.processes.agreement import gathered, together

Tree = TypeVar("Tree")
Report = Callable[[str], None]

ITEMS = ("model", "optimizer")


def _renamed(tree: Tree, leaves: dict[str, Any]) -> Tree:
    """A tree of the same structure with leaves looked up by name."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )


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
        self._args, self._save_args = ocp.args, ocp.SaveArgs
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
        with together():
            require_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
        sums = {item: checksums(leaves) for item, leaves in items.items()}
        loss = validation_loss if validation_loss < float("inf") else float("inf")  # NaN is no best
        saved = {
            item: self._args.StandardSave(leaves, save_args=self._in_layers(leaves))
            for item, leaves in items.items()
        }
        with _plain_errors(self._folder):
            self._manager.save(
                step,
                args=self._args.Composite(
                    **saved,
                    meta=self._args.JsonSave(meta | {"checksums": sums}),
                ),
                metrics={"validation_loss": loss},
                force=True,
            )

    def _in_layers(self, leaves: dict[str, Any]) -> dict[str, Any]:
        """How to store each array: stacked ones so that a layer can be read without the others."""
        return {
            name: self._save_args(shard_axes=(0,) if name.startswith("blocks.") else ())
            for name in leaves
        }

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
                f"a checkpoint could not be written to {self._folder}: {first_line(error)};"
                " older checkpoints are intact"
            ) from error


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
    _silence_abandoned_reads()
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
    json_handler = ocp.JsonCheckpointHandler()
    with ocp.Checkpointer(json_handler, multiprocessing_options=alone) as reader:
        meta = reader.restore((path / "meta").resolve())
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
        for item, tree in wanted.items():
            place, leaves = (path / item).resolve(), named_leaves(tree)
            stored = ocp.StandardCheckpointHandler().metadata(place).tree
            leaves = {
                name: leaf.update(dtype=stored[name].dtype) if name in stored else leaf
                for name, leaf in leaves.items()
            }
            trees[item] = _renamed(tree, reader.restore(place, leaves))
            meta["checksums"][item]  # an item without them is damaged
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
    for name, value in checksums(leaves).items():
        if value != expected.get(name):
            raise damaged(path, f"checksum of {item}.{name} differs")
