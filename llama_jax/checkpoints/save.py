"""Save checkpoints in the background, with a checksum of every array.

The checksum is the sum of the bits of all elements, each times 2·index + 1 so that swapped elements
are noticed, modulo 2³². It depends on values alone: not on sharding, nor on the parts in which an
array is read.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoints.layout import (
    file_checksum,
    finished_steps,
    names,
    orbax_path,
    quiet_orbax,
    with_checksum,
)
from llama_jax.checkpoints.run_folder import require_space
from llama_jax.distributed.consistency import together
from llama_jax.errors import UserError, reason
from llama_jax.model.parameters import named_leaves
from llama_jax.model.transformer import Llama
from llama_jax.text.tokenizer import tokenizer_path

PART = 2**18  # elements summed at once on the host, to hold little beside the array
SECONDS_TO_REMOVE = 5.0  # of a failed step, while its other arrays are still being written
DELETED = ".deleted"  # steps are moved into it before they are removed
ITEMS = ("model", "optimizer")  # flat mappings from a dotted name to an array


def checksums(leaves: dict[str, Any]) -> dict[str, int]:
    """Return the checksums of arrays by name, computed on the devices that hold them."""
    return {name: int(value) for name, value in jax.device_get(_checksums(leaves)).items()}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def checksum(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.bool:
            array = array.astype(jnp.uint8)
        width = jnp.dtype(array.dtype).itemsize * 8
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = index * jnp.uint32(size)
            index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(checksum, leaves)


def partial_checksum(array: np.ndarray, start: int = 0, part: int = PART) -> int:
    """Return what a part of an array adds to its checksum: those of all parts, modulo 2³².

    Args:
      array: consecutive elements in C order, of at most 4 bytes each.
      start: the index of the first of them.
      part: elements to sum at once.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{array.dtype.itemsize * 8}")
    weights = np.arange(1, 2 * min(part, bits.size), 2, dtype=np.uint32)
    total = 0
    for begin in range(0, bits.size, part):
        chunk = bits[begin : begin + part].astype(np.uint32, copy=False)
        offset = 2 * (start + begin) * int(chunk.sum(dtype=np.uint32))
        total += offset + int(np.dot(chunk, weights[: chunk.size]))
    return total % 2**32


class CheckpointWriter:
    """Saves checkpoints in the background; keeps the last few and the best.

    A step appears under its name when all of it is written, and loses it before any of it is
    removed, so that a process killed at any moment leaves only whole steps. Errors of a background
    save are raised by the next call of any method, as a `UserError` in one line.
    """

    def __init__(self, folder: Path, keep_last: int):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        quiet_orbax()
        best = policies.BestN(get_metric_fn=_validation_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
            best_fn=_validation_loss,  # without it Orbax forgets metrics when the process ends
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
            create=False,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._require_arrays),
        )
        self._folder, self._ocp = folder, ocp
        path = tokenizer_path(folder)
        self._tokenizer = {path.name: file_checksum(path)} if path.exists() else {}
        self._step = -1  # the one being saved
        self._has_failed = False
        self._names: dict[str, set[str]] = {}  # of its arrays, by item
        try:
            self._manager = ocp.CheckpointManager(
                orbax_path(folder), options=options, item_names=(*ITEMS, "meta")
            )
        except Exception as error:
            raise UserError(f"{folder} cannot take checkpoints: {reason(error)}") from error
        self._remove_deleted()  # of a process that was killed

    def save(
        self, step: int, model: Llama, optimizer: Any, meta: dict[str, Any], validation_loss: float
    ) -> None:
        """Start saving a step; its arrays may be donated as soon as this returns.

        Args:
          step: number of updates made, the name of the checkpoint.
          meta: what JSON can hold, returned again by `checkpoints.restore`.
          validation_loss: in nats per token; not finite if this step was not validated.
        """
        self.wait()
        items = {"model": named_leaves(model), "optimizer": named_leaves(optimizer)}
        with together():
            require_space(self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(items)))
        sums = {item: checksums(leaves) for item, leaves in items.items()}
        meta = with_checksum(meta | {"checksums": sums} | self._tokenizer)
        loss = validation_loss if validation_loss < float("inf") else float("inf")  # NaN is no best
        ocp, args = self._ocp, {}
        for item, leaves in items.items():  # stacked arrays so that one layer can be read alone
            axes = {name: (0,) if name.startswith("blocks.") else () for name in leaves}
            save_args = {name: ocp.SaveArgs(shard_axes=axes[name]) for name in leaves}
            args[item] = ocp.args.StandardSave(leaves, save_args=save_args)
        self._step, self._names = step, {item: set(leaves) for item, leaves in items.items()}
        with self._errors_of_saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)),
                metrics={"validation_loss": loss},
                force=True,
            )

    def _require_arrays(self) -> None:
        """Raise unless every item of the step being saved lists its arrays.

        Called by Orbax before the step gets its final name and older ones are deleted.
        """
        for item, expected in self._names.items():
            if missing := expected - set(names(self._partial / item)):
                raise ValueError(
                    f"array {min(missing)} of {item} is missing from the written files"
                )

    @property
    def _partial(self) -> Path:
        """Where the step being saved is written until it is complete."""
        return self._folder / f"{self._step}{self._ocp.utils.TMP_DIR_SUFFIX}"

    def raise_if_failed(self) -> None:
        """Raise `UserError` if the last save has failed; returns at once while it is running."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        with self._errors_of_saving():
            self._manager.wait_until_finished()
        self._remove_deleted()

    def close(self) -> None:
        """Wait, then release files and threads."""
        with self._errors_of_saving():
            self._manager.close()
        self._remove_deleted()
        if self._has_failed:  # other arrays of the step may have been written since
            self._remove_partial()

    def _remove_deleted(self) -> None:
        """Remove the steps that a newer one has replaced; what fails is tried again later."""
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / DELETED, ignore_errors=True)

    def _remove_partial(self) -> None:
        """Remove what was written of the failed step, also while other arrays are being written."""
        deadline = time.monotonic() + SECONDS_TO_REMOVE
        while jax.process_index() == 0 and self._partial.exists():
            shutil.rmtree(self._partial, ignore_errors=True)
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    @contextlib.contextmanager
    def _errors_of_saving(self) -> Iterator[None]:
        """Turn what Orbax raises into a line, and remove what was written of the failed step."""
        try:
            yield
        except Exception as error:
            self._has_failed = True
            self._remove_partial()
            steps = finished_steps(self._folder) if self._folder.is_dir() else []
            after = f"goes on from step {steps[-1]}" if steps else "begins again: there is none yet"
            raise UserError(
                f"the checkpoint of step {self._step} could not be saved in {self._folder}:"
                f" {reason(error)}; the same command {after}"
            ) from error


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]
