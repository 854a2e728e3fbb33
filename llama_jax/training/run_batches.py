"""The batches of a run, as its config wants them, on the devices of its mesh."""

from functools import partial

from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.data.batches import training_batches, validation_batches
from llama_jax.data.tokens import TokenFolder
from llama_jax.processes.process_rows import GlobalBatches


def batches_to_train_on(config: Config, data: TokenFolder, mesh: Mesh, step: int) -> GlobalBatches:
    """Those of the steps after this one; they never end."""
    read = partial(
        training_batches,
        data,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.data.seed,
        packing=config.data.packing,
        start_step=step,
    )
    return GlobalBatches(read, config.data.batch_size, mesh)


def batches_to_validate_on(config: Config, data: TokenFolder, mesh: Mesh) -> GlobalBatches:
    """Those of a validation, the same at each, as large as a microbatch.

    Raises:
      UserError: when the text held back is too short for one.
    """
    read = partial(
        validation_batches,
        data,
        batch_size=config.microbatch_size,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        limit=config.run.eval_batches,
    )
    return GlobalBatches(read, config.microbatch_size, mesh)
