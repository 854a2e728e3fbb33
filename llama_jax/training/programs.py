"""What a run does over and over, jitted for its mesh, with shardings stated and the state donated.

What the mesh cannot do is refused here, once and before anything is traced. What the programs
compute, `train_step` knows.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.attention.self_attention import self_attention
from llama_jax.config import Config
from llama_jax.data.batches import Batch
from llama_jax.model import Llama
from llama_jax.parallel.fitting import require_fitting
from llama_jax.parallel.sharding import batch_sharding, shardings
from llama_jax.remat import require_possible
from llama_jax.training.train_step import (
    TrainState,
    abstract_state,
    evaluation_step,
    init_state,
    train_step,
)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Where each array of the state lies."""
    return shardings(abstract_state(config), mesh)


def jit_train_step(config: Config, mesh: Mesh) -> Any:
    """`train_step` for a mesh; it takes the state's memory over.

    Raises:
      UsageError: when the config does not divide over the mesh, or its devices lack the attention
        or what `run.remat` takes.
    """
    require_fitting(config, mesh.shape)
    require_possible(config.run.remat)
    model, device = config.model, mesh.devices.flat[0]
    attention = self_attention(config.run.attention, model, model.dropout, device)
    places, replicated = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partial(train_step, config=config, attention=attention),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(places, replicated),
        donate_argnums=0,
    )


@dataclasses.dataclass(frozen=True)
class Programs:
    """The two that a run asks again and again."""

    train: Any  # `train_step`
    evaluate: Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]  # `evaluation_step`


def jit_programs(config: Config, mesh: Mesh) -> Programs:
    """A run's programs, neither traced nor compiled yet.

    Raises:
      UsageError: see `jit_train_step` and `jit_evaluation_step`.
    """
    return Programs(jit_train_step(config, mesh), jit_evaluation_step(config, mesh))


def jit_init(config: Config, mesh: Mesh) -> Callable[[], TrainState]:
    """`init_state` for a mesh: each device makes its own part."""
    return jax.jit(partial(init_state, config), out_shardings=state_shardings(config, mesh))


def jit_evaluation_step(
    config: Config, mesh: Mesh
) -> Callable[[Llama, Batch], tuple[jax.Array, jax.Array]]:
    """`evaluation_step` for a mesh.

    Raises:
      UsageError: when its devices lack the attention.
    """
    attention = self_attention(config.run.attention, config.model, device=mesh.devices.flat[0])
    places, replicated = state_shardings(config, mesh).model, NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partial(evaluation_step, config=config, attention=attention),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(replicated, replicated),
    )
