"""Where a run goes on: the newest whole checkpoint's state, or the state before the first step."""

import dataclasses
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoints.reader import restore_newest
from llama_jax.config import Config
from llama_jax.data.tokens import TokenFolder
from llama_jax.errors import UserError
from llama_jax.instruments.metrics import warn
from llama_jax.parallel.sharding import placed
from llama_jax.training.programs import jit_init, state_shardings
from llama_jax.training.train_step import TrainState, abstract_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a sitting begins with."""

    state: TrainState
    begun: float  # when, by `time.perf_counter`
    step: int = 0  # updates made so far
    saved_step: int = -1  # that of the newest checkpoint; -1: there is none
    best_loss: float = math.inf  # of all validations so far


def restore_or_begin(config: Config, folder: Path, data: TokenFolder, mesh: Mesh) -> Beginning:
    """The newest whole checkpoint's state on this mesh, or the state before the first step.

    Raises:
      UserError: when no checkpoint is whole, or the data are not those it was trained on.
    """
    begun, places = time.perf_counter(), state_shardings(config, mesh)
    wanted = placed(abstract_state(config), places)
    items = {"model": wanted.model, "optimizer": wanted.optimizer}
    restored = restore_newest(folder, items, report=warn, set_aside=True)
    if restored is None:
        return Beginning(state=jit_init(config, mesh)(), begun=begun)
    if restored.meta.get("data") != data.fingerprint and not config.data.allow_change:
        raise UserError(
            f"the data in {data.path} are not those that step {restored.step} of"
            f" {folder} was trained on; restore them, or accept the change with"
            " --config.data.allow_change=true"
        )
    step, healthy = jax.device_put(
        (jnp.int32(restored.step), jnp.bool(True)), (places.step, places.healthy)
    )
    model, optimizer = restored.trees["model"], restored.trees["optimizer"]
    return Beginning(
        state=TrainState(step, healthy, model, optimizer),
        begun=begun,
        step=restored.step,
        saved_step=restored.step,
        best_loss=restored.meta.get("best_validation_loss", math.inf),
    )
