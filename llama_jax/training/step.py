"""One step of training, (state, batch) → (state, metrics), and the state it turns.

Dropout's key is a function of the seed and the step, so a resumed run draws what an uninterrupted
one would have drawn. How a step is compiled for a mesh, `programs` knows.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.config import Config
from llama_jax.data.loader import Batch
from llama_jax.distributed.fitting import require_fitting
from llama_jax.distributed.fsdp import gradients_over_rows, sums_over_rows
from llama_jax.distributed.mesh import batch_sharding, rules_of, shardings
from llama_jax.kernels.attention import SelfAttention, self_attention
from llama_jax.model.execution import require_possible
from llama_jax.model.transformer import Llama
from llama_jax.training.loss import summed_loss, summed_nll
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # updates made so far
    healthy: jax.Array  # False once a loss or gradient was not finite: then nothing changes
    model: Llama
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step tells, as float32 scalars on the device."""

    loss: jax.Array  # mean nats per unmasked token, before the update
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    healthy: jax.Array  # whether the update was made


def init_state(config: Config) -> TrainState:
    """The state before the first step, a pure function of `config.run.seed`."""
    model = Llama(config.model, rngs=nnx.Rngs(config.run.seed))
    optimizer = make_optimizer(config.optimizer).init(model)
    return TrainState(jnp.int32(0), jnp.bool(True), model, optimizer)


@lru_cache(maxsize=16)
def abstract_state(config: Config) -> TrainState:
    """That state with shapes in place of arrays; costs no memory. Shared, so not to be changed."""
    return jax.eval_shape(lambda: init_state(config))


def train_step(
    state: TrainState, batch: Batch, config: Config, attention: SelfAttention | None = None
) -> tuple[TrainState, StepMetrics]:
    """One update from a whole batch, microbatch by microbatch.

    Losses and gradients are summed over microbatches, then over devices, and divided once by the
    number of unmasked tokens, so cutting the batch differently changes nothing but rounding.
    `attention` is the kernel, by default the one that the config means on this process's devices.
    """
    key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    (nll, tokens), gradients = summed_gradients(state.model, batch, key, config, attention)
    tokens = jnp.maximum(tokens, 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / tokens, gradients)
    return _update(state, nll / tokens, gradients, config)


def summed_gradients(
    model: Llama,
    batch: Batch,
    key: jax.Array,
    config: Config,
    attention: SelfAttention | None = None,
) -> tuple[tuple[jax.Array, jax.Array], Llama]:
    """((nll, number of unmasked tokens), gradients of the loss), summed over the whole batch.

    `key` decides dropout; `attention` as in `train_step`.
    """
    attention = attention or self_attention(
        config.run.attention, config.model, config.model.dropout
    )
    accumulated = partial(_accumulated, key=key, config=config, attention=attention)
    with rules_of(config.mesh):
        return gradients_over_rows(accumulated, model, batch)


def _accumulated(
    model: Llama, batch: Batch, *, key: jax.Array, config: Config, attention: SelfAttention
) -> tuple[tuple[jax.Array, jax.Array], Llama]:
    """The nll and number of tokens of some rows, and the gradients of their loss, all summed."""

    def summed(model: Llama, batch: Batch, row_B: jax.Array) -> tuple[jax.Array, Any]:
        hidden_BTD, _ = model.hidden(
            batch.inputs_BT,
            segments_BT=batch.segments_BT,
            dropout_key=jax.random.fold_in(key, row_B[0]) if config.model.dropout else None,
            remat=config.run.remat,
            attention=attention,
        )
        targets = (batch.targets_BT, batch.weights_BT)
        loss, nll = summed_loss(hidden_BTD, model.output_VD, *targets, config.optimizer.z_loss)
        return loss, (nll, jnp.sum(batch.weights_BT))

    rows = batch.inputs_BT.shape[0]
    microbatches = config.optimizer.accumulation_steps
    accumulated = optax.microbatch(
        jax.value_and_grad(summed, has_aux=True),
        argnums=(1, 2),
        microbatch_size=rows // microbatches if microbatches > 1 else None,
    )
    (_, sums), gradients = accumulated(model, batch, jnp.arange(rows))
    return sums, gradients


def _update(
    state: TrainState, loss: jax.Array, gradients: Llama, config: Config
) -> tuple[TrainState, StepMetrics]:
    """The state after the optimizer's update, or unchanged if it would be spoilt."""
    norm = optax.tree.norm(gradients)
    healthy = state.healthy & jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer = make_optimizer(config.optimizer).update(
        gradients, state.optimizer, state.model
    )
    model = optax.apply_updates(state.model, updates)
    moved = TrainState(state.step + 1, healthy, model, optimizer)
    stayed = dataclasses.replace(state, healthy=healthy)
    rate = learning_rate_schedule(config.optimizer)(state.step)
    metrics = StepMetrics(loss, norm, jnp.float32(rate), healthy)
    return jax.tree.map(partial(jnp.where, healthy), moved, stayed), metrics


def evaluation_step(
    model: Llama, batch: Batch, config: Config, attention: SelfAttention | None = None
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of a batch and its number of unmasked tokens.

    `attention` as in `train_step`, but that nothing is dropped.
    """
    attention = attention or self_attention(config.run.attention, config.model)

    def sums(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, _ = model.hidden(
            batch.inputs_BT, segments_BT=batch.segments_BT, attention=attention
        )
        nll = summed_nll(hidden_BTD, model.output_VD, batch.targets_BT, batch.weights_BT)
        return nll, jnp.sum(batch.weights_BT)

    with rules_of(config.mesh):
        return sums_over_rows(sums, model, batch)


# What a run does over and over, jitted for its mesh, with shardings stated and the state donated.
#
# What the mesh cannot do is refused here, once and before anything is traced. What the programs
# compute, `train_step` knows.


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
