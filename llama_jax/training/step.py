"""One step of training: (state, batch) → (state, metrics).

The state is split into what is trained and what is frozen, and the loss is an argument, so that
fine-tuning is another state and another objective, not another step; see `training.objectives`.

Dropout's key is a function of the seed and the step: a resumed run draws what an uninterrupted one
would have drawn.
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

from llama_jax.config import FLOAT_BASES, STORED, Config
from llama_jax.data.loader import Batch
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
    require_fitting,
    shardings,
)
from llama_jax.errors import UsageError
from llama_jax.inference.decode import attention_on_mesh
from llama_jax.kernels.attention import DROPS_WEIGHTS, choose_kernel
from llama_jax.model.execution import HOST_MEMORY, Execution, choose_remat
from llama_jax.model.layers import Linear, OutputsFirstLinear
from llama_jax.model.lora import Adapters, init_adapters
from llama_jax.model.transformer import Llama, replace_linears
from llama_jax.quantization import quantize, restack
from llama_jax.training.objectives import Loss, Sums, objective_of
from llama_jax.training.optimizer import learning_rate_schedule, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step takes and returns."""

    step: jax.Array  # int32, updates made so far
    healthy: jax.Array  # False once a loss or gradient was not finite: then nothing changes
    trainable: Any  # parameters with gradients and moments: the whole `Llama`, or adapters
    frozen: Any  # parameters that the loss only reads: their base, or a reference model; or None
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of a step, as float32 scalars on the device."""

    loss: jax.Array  # mean per unmasked token, in nats, or per pair, before the update
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    healthy: jax.Array  # whether the update was made
    others: dict[str, jax.Array]  # means of what else the objective reports, by name


def init_state(config: Config) -> TrainState:
    """Return the state before the first step, a pure function of `config.run.seed`.

    With `run.init_from`, the weights of that checkpoint take the places of random ones; see
    `training.initial`.
    """
    model = Llama(config.model, rngs=nnx.Rngs(config.run.seed))
    trainable: Any = model
    frozen = None
    if config.lora.rank:
        trainable, frozen = first_adapters(config), as_base(model, config)
    elif config.optimizer.loss == "dpo":
        frozen = as_base(model, config)
    optimizer = make_optimizer(config.optimizer).init(trainable)
    return TrainState(jnp.int32(0), jnp.bool(True), trainable, frozen, optimizer)


def first_adapters(config: Config) -> Adapters:
    """Return the adapters before the first step, a pure function of `config.run.seed`."""
    return init_adapters(config.model, config.lora, jax.random.key(config.run.seed))


def as_base(model: Llama, config: Config, *, consume: bool = False) -> Llama:
    """Return a model as `lora.base` stores frozen weights, its blocks stacked where possible.

    Args:
      consume: of floats, delete each array once it is copied, so that few are in memory twice;
        `model` cannot be used afterwards.
    """
    kind = config.lora.base
    if kind in FLOAT_BASES:
        dtype = config.model.compute_dtype if kind == "compute" else kind
        model = jax.tree.map(lambda array: array.astype(dtype), model)

        def laid_out(_: str, layer: Linear) -> Linear | OutputsFirstLinear:
            """Queries, keys and values outputs first, the layout that a TPU's matmuls read."""
            if len(layer.outputs) == 1:
                return layer
            new = jax.vmap(OutputsFirstLinear)(layer)
            if consume:
                jax.block_until_ready(new)
                layer.kernel[...].delete()
            return new

        replace_linears(model.blocks, laid_out)
        return model
    if not kind.startswith(STORED):
        double = config.lora.double_quantization
        return quantize(model, kind, double_quantization=double, stacked=True)
    if isinstance(model.embedding, nnx.Param):  # a float model of the same shape
        name, *sizes = kind.removeprefix(STORED).split("-")
        model = quantize(model, name, *map(int, sizes))
    return restack(model)


@lru_cache(maxsize=16)
def abstract_state(config: Config) -> TrainState:
    """Return `init_state` with shapes in place of arrays. Cached: do not modify it."""
    return jax.eval_shape(lambda: init_state(config))


UNROLLED_ON_CPU = 16  # a rolled-up scan copies what each layer keeps: 5 % slower on CPU


def make_execution(config: Config, mesh: Mesh | None = None, *, training: bool = True) -> Execution:
    """Return how a run's model is executed on a mesh, or on this process's first device.

    Args:
      training: whether there is a backward pass, and dropout.

    Raises:
      UsageError: if the devices lack the attention kernel or what `run.remat` needs.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    remat = choose_remat(config.run.remat, device.platform) if training else "none"
    if remat == "offload":
        _require_host_memory()
    kernel = attention_kernel(config, device, training=training)
    # Recomputed blocks stay rolled up: unrolled, all of them would be in memory together. With
    # adapters a layer keeps less, copying it costs nothing, and compiling is 7 times as fast.
    is_unrolled = device.platform == "cpu" and remat == "none" and not config.lora.rank
    return Execution(
        attention=attention_on_mesh(kernel),
        drops_weights=kernel in DROPS_WEIGHTS,
        remat=remat,
        unroll=UNROLLED_ON_CPU if is_unrolled else 1,
        constrain=constrain_sequence if config.mesh.sequence else constrain,
        gather=gather if mesh is not None and mesh.shape["fsdp"] > 1 else None,
        lookup=lookup,
        example_ids=example_ids,
    )


def attention_kernel(config: Config, device: jax.Device, *, training: bool) -> str:
    """Return the name of a run's attention kernel; only training has dropout.

    Raises:
      UsageError: if the device lacks the kernel that the config names.
    """
    return choose_kernel(
        config.run.attention,
        device,
        head_dim=config.model.head_size,
        dtype=config.model.compute_dtype,
        dropout=config.model.dropout if training else 0.0,
        position=config.model.position,
    )


def _require_host_memory() -> None:
    """Raise `UsageError` if this process's devices cannot address the host's memory."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UsageError(
            f"run.remat='offload' needs memory of kind {HOST_MEMORY} and {device.device_kind} has"
            f" only {', '.join(kinds)}; use run.remat='save-qkv', or 'block' for the least memory"
        )


def train_step(
    state: TrainState,
    batch: Batch,
    config: Config,
    execution: Execution,
    loss: Loss | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Make one update from a batch, microbatch by microbatch.

    Losses and gradients are summed over microbatches, then over devices, and divided once by the
    sum of the weights, so that the number of microbatches changes nothing but rounding.

    Args:
      loss: by default that of the config's objective.
    """
    key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
    sums, gradients = summed_gradients(
        state.trainable, state.frozen, batch, key, config, execution, loss
    )
    weights = jnp.maximum(sums.pop("weights"), 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / weights, gradients)
    means = {name: total / weights for name, total in sums.items()}
    return _update(state, means, gradients, config)


def summed_gradients(
    trainable: Any,
    frozen: Any,
    batch: Batch,
    key: jax.Array,
    config: Config,
    execution: Execution,
    loss: Loss | None = None,
) -> tuple[Sums, Any]:
    """Return (sums by name, gradients of the trainable part), over the whole batch.

    Dropout is drawn from `key`.
    """

    loss = loss or objective_of(config).loss
    has_dropout = bool(config.model.dropout or config.lora.dropout)

    def accumulated(trainable: Any, frozen: Any, batch: Batch) -> tuple[Sums, Any]:
        def microbatch(trainable: Any, batch: Batch, row_B: jax.Array) -> tuple[jax.Array, Sums]:
            dropout_key = jax.random.fold_in(key, row_B[0]) if has_dropout else None
            return loss(
                trainable,
                frozen,
                batch,
                config=config,
                execution=execution,
                dropout_key=dropout_key,
            )

        B = batch.inputs_BT.shape[0]
        microbatches = config.optimizer.accumulation_steps
        gradients_of = optax.microbatch(
            jax.value_and_grad(microbatch, has_aux=True),
            argnums=(1, 2),
            microbatch_size=B // microbatches if microbatches > 1 else None,
        )
        (_, sums), gradients = gradients_of(trainable, batch, jnp.arange(B))
        return sums, gradients

    return gradients_over_rows(accumulated, trainable, frozen, batch)


def _update(
    state: TrainState, means: dict[str, jax.Array], gradients: Any, config: Config
) -> tuple[TrainState, StepMetrics]:
    """Apply the optimizer, or keep the state where loss or gradients are not finite."""
    loss = means.pop("loss")
    norm = optax.tree.norm(gradients)
    healthy = state.healthy & jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, optimizer = make_optimizer(config.optimizer).update(
        gradients, state.optimizer, state.trainable
    )
    trainable = optax.apply_updates(state.trainable, updates)
    changed = dataclasses.replace(
        state, step=state.step + 1, healthy=healthy, trainable=trainable, optimizer=optimizer
    )
    kept = dataclasses.replace(state, healthy=healthy)
    rate = learning_rate_schedule(config.optimizer)(state.step)
    metrics = StepMetrics(loss, norm, jnp.float32(rate), healthy, means)
    return jax.tree.map(partial(_where, healthy), changed, kept), metrics


def _where(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return x if x is y else jnp.where(condition, x, y)  # frozen arrays are passed through


def evaluation_step(
    trainable: Any, frozen: Any, batch: Batch, config: Config, execution: Execution
) -> Sums:
    """Return the sums of the objective's metrics over a batch."""

    def sums(trainable: Any, frozen: Any, batch: Batch) -> Sums:
        metrics = objective_of(config).metrics
        return metrics(trainable, frozen, batch, config=config, execution=execution)

    return sums_over_rows(sums, trainable, frozen, batch)


# ---- the programs of a run, jitted for its mesh ----


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a run, neither traced nor compiled yet."""

    init: Callable[[], TrainState]  # `init_state`, each device making its own shards
    train: Any  # `train_step`: (state, batch) → (state, metrics); the state is donated
    evaluate: Callable[[Any, Any, Batch], Sums]  # `evaluation_step`: (trainable, frozen, batch)


@lru_cache(maxsize=16)
def jit_programs(config: Config, mesh: Mesh) -> Programs:
    """Return the programs of a run on a mesh.

    Cached, so that further sessions of a run in one process compile nothing again.

    Raises:
      UsageError: if the config does not divide over the mesh, or its devices lack the attention
        kernel or what `run.remat` needs.
    """
    execution = make_execution(config, mesh, training=False)
    places, replicated = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    return Programs(
        init=jax.jit(partial(init_state, config), out_shardings=places),
        train=jit_train_step(config, mesh),
        evaluate=jax.jit(
            partial(evaluation_step, config=config, execution=execution),
            in_shardings=(places.trainable, places.frozen, batch_sharding(mesh)),
            out_shardings=replicated,
        ),
    )


def jit_train_step(
    config: Config,
    mesh: Mesh,
    execution: Execution | None = None,
) -> Any:
    """Return `train_step` jitted for a mesh, with the state donated.

    Args:
      execution: by default that of `make_execution`.

    Raises:
      UsageError: see `jit_programs`.
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


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Return the sharding of each array of the state."""
    return shardings(abstract_state(config), mesh)
