"""Checksums of arrays: does what is read have the bits that were written?

A checksum is the sum of an array's bits modulo 2³², each element's times 2·place + 1, so that two
that swap places are noticed. It depends on values alone: not on sharding, and not on the portions
in which an array is read. Does not know where arrays come from.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoints.layout import first_line, names, orbax_path
from llama_jax.checkpoints.run_folder import require_space
from llama_jax.distributed.consistency import together
from llama_jax.errors import UserError
from llama_jax.model.parameters import named_leaves
from llama_jax.model.transformer import Llama

PORTION = 2**18  # elements summed at once on the host; what is held beside the array is small


def checksums(leaves: dict[str, Any]) -> dict[str, int]:
    """The checksums of a mapping of arrays, computed where each of them lies."""
    return {name: int(value) for name, value in jax.device_get(_checksums(leaves)).items()}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
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


def partial_checksum(part: np.ndarray, start: int = 0) -> int:
    """What a part of an array on the host adds to its checksum.

    The checksum is the sum of those of all parts, modulo 2³².

    Args:
      part: elements that follow each other in the array, in C order and of at most 4 bytes each.
      start: the place of the first of them.
    """
    bits = np.ascontiguousarray(part).reshape(-1).view(f"uint{part.dtype.itemsize * 8}")
    weights = np.arange(1, 2 * min(PORTION, bits.size), 2, dtype=np.uint32)
    total = 0
    for begin in range(0, bits.size, PORTION):
        portion = bits[begin : begin + PORTION].astype(np.uint32, copy=False)
        moved = 2 * (start + begin) * int(portion.sum(dtype=np.uint32))
        total += moved + int(np.dot(portion, weights[: portion.size]))
    return total % 2**32


# Whole checkpoints, written.
#
# A checkpoint is a step's folder with three items: `model` and `optimizer`, flat mappings from a
# dotted name to an array, and `meta`, JSON with a checksum of every array. Orbax makes a folder
# appear whole or not at all; that its bytes are still what was written, the checksums tell.

ITEMS = ("model", "optimizer")


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
            async_options=ocp.AsyncOptions(post_finalization_callback=self._check_arrays),
        )
        self._folder = folder
        self._partial = lambda: folder / f"{self._step}{ocp.utils.TMP_DIR_SUFFIX}"
        self._step, self._names = -1, dict[str, set[str]]()  # of the step that is being written
        self._args, self._save_args = ocp.args, ocp.SaveArgs
        with _plain_errors(folder):
            self._manager = ocp.CheckpointManager(
                orbax_path(folder), options=options, item_names=(*ITEMS, "meta")
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
        self.wait()  # for the step before, which `_check_arrays` may still be looking at
        self._step, self._names = step, {item: set(leaves) for item, leaves in items.items()}
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

    def _check_arrays(self) -> None:
        """Raise unless every item lists its arrays; called before a step gets its final name.

        What is raised here ends the save: older steps are kept.
        """
        for item, expected in self._names.items():
            if missing := expected - set(names(self._partial() / item)):
                raise ValueError(f"{min(missing)} of {item} is missing from step {self._step}")

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
