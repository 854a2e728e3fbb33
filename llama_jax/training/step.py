"""One step of training, (state, batch) → (state, metrics), and the state it turns.

Dropout's key is a function of the seed and the step, so a resumed run draws what an uninterrupted
one would have drawn.
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
from llama_jax.distributed.fsdp import (
    example_ids,
    gather,
    gradients_over_rows,
    lookup,
    sums_over_rows,
)
from llama_jax.distributed.mesh import (
    batch_sharding,
    constrain,
    constrain_sequence,
    shardings,
)
from llama_jax.errors import UsageError
from llama_jax.inference.decode import attention_on_mesh
from llama_jax.kernels.attention import choose_kernel
from llama_jax.model.execution import HOST_MEMORY, Execution
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


UNROLLED_ON_CPU = 16  # a rolled-up scan copies what each layer keeps: 5 % slower on CPU


def make_execution(config: Config, mesh: Mesh | None = None, *, training: bool = True) -> Execution:
    """How a run's model is executed on a mesh, or on this process's first device.

    Args:
      training: whether there is a backward pass, and dropout.

    Raises:
      UsageError: when the devices lack the attention kernel or what `run.remat` needs.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    remat = config.run.remat if training else "none"
    if remat == "offload":
        _require_host_memory()
    kernel = attention_kernel(config, device, training=training)
    return Execution(
        attention=attention_on_mesh(kernel),
        remat=remat,
        # Recomputed blocks stay rolled up: unrolled, all of them would be in memory together.
        unroll=UNROLLED_ON_CPU if device.platform == "cpu" and remat == "none" else 1,
        constrain=constrain_sequence if config.mesh.sequence else constrain,
        gather=gather if mesh is not None and mesh.shape["fsdp"] > 1 else None,
        lookup=lookup,
        example_ids=example_ids,
    )


def attention_kernel(config: Config, device: jax.Device, *, training: bool) -> str:
    """The name of the attention kernel of a run; only training drops attention weights.

    Raises:
      UsageError: when the device lacks the kernel that the config names.
    """
    return choose_kernel(
        config.run.attention,
        device,
        head_dim=config.model.head_size,
        dtype=config.model.compute_dtype,
        dropout=config.model.dropout if training else 0.0,
    )


def _require_host_memory() -> None:
    """Raise `UsageError` when this process's devices do not reach the host's memory."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UsageError(
            f"run.remat='offload' needs memory of kind {HOST_MEMORY} and {device.device_kind} has"
            f" only {', '.join(kinds)}; use run.remat='save-qkv', or 'block' for the least memory"
        )


def train_step(
    state: TrainState, batch: Batch, config: Config, execution: Execution
) -> tuple[TrainState, StepMetrics]:
    """One update from a whole batch, microbatch by microbatch.

    Losses and gradients are summed over microbatches, then over devices, and divided once by the
    number of unmasked tokens, so that other microbatches change nothing but rounding.
    """
    key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    (nll, tokens), gradients = summed_gradients(state.model, batch, key, config, execution)
    tokens = jnp.maximum(tokens, 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / tokens, gradients)
    return _update(state, nll / tokens, gradients, config)


def summed_gradients(
    model: Llama,
    batch: Batch,
    key: jax.Array,
    config: Config,
    execution: Execution,
) -> tuple[tuple[jax.Array, jax.Array], Llama]:
    """((nll, number of unmasked tokens), gradients of the loss), summed over the whole batch.

    Dropout is drawn from `key`.
    """
    accumulated = partial(_accumulated, key=key, config=config, execution=execution)
    return gradients_over_rows(accumulated, model, batch)


def _accumulated(
    model: Llama, batch: Batch, *, key: jax.Array, config: Config, execution: Execution
) -> tuple[tuple[jax.Array, jax.Array], Llama]:
    """The nll and number of tokens of some rows, and the gradients of their loss, all summed."""

    def summed(model: Llama, batch: Batch, row_B: jax.Array) -> tuple[jax.Array, Any]:
        hidden_BTD, _ = model.hidden(
            batch.inputs_BT,
            segments_BT=batch.segments_BT,
            dropout_key=jax.random.fold_in(key, row_B[0]) if config.model.dropout else None,
            execution=execution,
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
    model: Llama, batch: Batch, execution: Execution
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of a batch and its number of unmasked tokens."""

    def sums(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, _ = model.hidden(
            batch.inputs_BT, segments_BT=batch.segments_BT, execution=execution
        )
        nll = summed_nll(hidden_BTD, model.output_VD, batch.targets_BT, batch.weights_BT)
        return nll, jnp.sum(batch.weights_BT)

    return sums_over_rows(sums, model, batch)


# The programs of a run, jitted for its mesh, with shardings stated and the state donated. What the
# mesh cannot do is refused here, before anything is traced.


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Where each array of the state lies."""
    return shardings(abstract_state(config), mesh)


def jit_train_step(config: Config, mesh: Mesh, execution: Execution | None = None) -> Any:
    """`train_step` for a mesh, with the state donated; by default run as `make_execution` has it.

    Raises:
      UsageError: when the config does not divide over the mesh, or its devices lack the attention
        or what `run.remat` takes.
    """
    require_fitting(config, mesh.shape)
    execution = execution or make_execution(config, mesh)
    places, replicated = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partial(train_step, config=config, execution=execution),
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
    execution = make_execution(config, mesh, training=False)
    places, replicated = state_shardings(config, mesh).model, NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partial(evaluation_step, execution=execution),
        in_shardings=(places, batch_sharding(mesh)),
        out_shardings=(replicated, replicated),
    )
