"""What a run minimises and what it reports, as functions of its state and a batch.

The state has a trainable and a frozen part. In pretraining, and where all weights are tuned, the
trainable part is the whole model; with `lora.rank` it is adapters, and the frozen part is the model
that they are attached to. With "dpo" the reference model is the frozen part: the model without its
adapters, or a copy of it from the start.

Every function returns sums over the sequences of the batch, by name: "weights", by whose sum over
all microbatches and devices gradients and all others are divided, "loss", and further metrics.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from llama_jax.config import Config
from llama_jax.data.loader import Batch
from llama_jax.model.execution import Execution
from llama_jax.model.lora import attach
from llama_jax.model.transformer import ONE_DEVICE, Llama
from llama_jax.training.loss import summed_loss, target_logprobs

Sums = dict[str, jax.Array]


class Loss(Protocol):
    """A loss to train with, summed over sequences."""

    def __call__(
        self,
        trainable: Any,
        frozen: Any,
        batch: Batch,
        *,
        config: Config,
        execution: Execution,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Sums]:
        """Return (a sum whose gradient is that of the summed loss, the sums to report).

        Without a `dropout_key` nothing is dropped.
        """
        ...


class Metrics(Protocol):
    """What is measured on held-out sequences, without dropout."""

    def __call__(
        self, trainable: Any, frozen: Any, batch: Batch, *, config: Config, execution: Execution
    ) -> Sums:
        """Return the sums to report."""
        ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and the metrics of validation."""

    loss: Loss
    metrics: Metrics


def model_of(
    config: Config,
    trainable: Any,
    frozen: Any,
    *,
    execution: Execution = ONE_DEVICE,
    dropout_key: jax.Array | None = None,
) -> Llama:
    """Return the model that a state trains: its trainable part, or the frozen one with adapters."""
    if not config.lora.rank:
        return trainable
    return attach(frozen, trainable, config.lora, key=dropout_key, execution=execution)


def _hidden(
    model: Llama, batch: Batch, execution: Execution, key: jax.Array | None = None
) -> jax.Array:
    return model.hidden(
        batch.inputs_BT, segments_BT=batch.segments_BT, dropout_key=key, execution=execution
    )[0]


def _target_logprobs(
    model: Llama, batch: Batch, execution: Execution
) -> tuple[jax.Array, jax.Array]:
    """Return what `loss.target_logprobs` does, of a model without dropout."""
    hidden_BTD = _hidden(model, batch, execution)
    return target_logprobs(hidden_BTD, model.output_VD, batch.targets_BT)


# ---- next-token prediction ----


def next_token_loss(
    trainable: Any,
    frozen: Any,
    batch: Batch,
    *,
    config: Config,
    execution: Execution,
    dropout_key: jax.Array | None,
    with_accuracy: bool = False,
) -> tuple[jax.Array, Sums]:
    """The cross-entropy of each target, and the z-loss of the config; a `Loss`.

    Args:
      with_accuracy: also report "train_accuracy", for which the logits are computed once more.
    """
    model = model_of(config, trainable, frozen, execution=execution, dropout_key=dropout_key)
    hidden_BTD = _hidden(model, batch, execution, dropout_key)
    targets = batch.targets_BT, batch.weights_BT
    loss, nll = summed_loss(hidden_BTD, model.output_VD, *targets, config.optimizer.z_loss)
    sums = {"loss": nll, "weights": jnp.sum(batch.weights_BT)}
    if with_accuracy:
        _, is_top_BT = target_logprobs(hidden_BTD, model.output_VD, batch.targets_BT)
        sums["train_accuracy"] = jnp.sum(is_top_BT * batch.weights_BT)
    return loss, sums


def next_token_metrics(
    trainable: Any, frozen: Any, batch: Batch, *, config: Config, execution: Execution
) -> Sums:
    """The loss, and how many targets are the most probable token ("accuracy"); `Metrics`."""
    model = model_of(config, trainable, frozen, execution=execution)
    logprobs_BT, is_top_BT = _target_logprobs(model, batch, execution)
    weights_BT = batch.weights_BT
    return {
        "loss": -jnp.sum(logprobs_BT * weights_BT),
        "accuracy": jnp.sum(is_top_BT * weights_BT),
        "weights": jnp.sum(weights_BT),
    }


# ---- direct preference optimisation (Rafailov et al. 2023) ----
#
# A sequence holds pairs as adjacent segments: 2k + 1 is a prompt with its chosen answer, 2k + 2 the
# prompt with its rejected one; the weights mark the answers' tokens. P: pairs in a sequence.


def dpo_loss(
    trainable: Any,
    frozen: Any,
    batch: Batch,
    *,
    config: Config,
    execution: Execution,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Sums]:
    """The DPO loss of each pair; a `Loss`.

    The loss depends on an answer's tokens only through the sum of their log-probabilities. So its
    gradient is that of a cross-entropy whose weights are the loss's derivatives by those sums, and
    no logits of all tokens exist.
    """
    model = model_of(config, trainable, frozen, execution=execution, dropout_key=dropout_key)
    hidden_BTD = _hidden(model, batch, execution, dropout_key)
    logprobs_BT, _ = target_logprobs(hidden_BTD, model.output_VD, batch.targets_BT)
    ratios_BT = _ratios(logprobs_BT, frozen, batch, execution)
    derivative_BT, sums = jax.grad(pair_sums, has_aux=True)(ratios_BT, batch, config)
    weights_BT = -derivative_BT * batch.weights_BT
    surrogate, _ = summed_loss(hidden_BTD, model.output_VD, batch.targets_BT, weights_BT, 0.0)
    return surrogate, sums


def dpo_metrics(
    trainable: Any, frozen: Any, batch: Batch, *, config: Config, execution: Execution
) -> Sums:
    """The DPO loss, rewards and accuracy; `Metrics`."""
    model = model_of(config, trainable, frozen, execution=execution)
    logprobs_BT, _ = _target_logprobs(model, batch, execution)
    return pair_sums(_ratios(logprobs_BT, frozen, batch, execution), batch, config)[1]


def _ratios(
    logprobs_BT: jax.Array, reference: Llama, batch: Batch, execution: Execution
) -> jax.Array:
    """Return log-probabilities minus those of the reference model; 0 outside of the answers."""
    reference_BT, _ = _target_logprobs(reference, batch, execution)
    return (logprobs_BT - reference_BT) * batch.weights_BT


def pair_sums(ratios_BT: jax.Array, batch: Batch, config: Config) -> tuple[jax.Array, Sums]:
    """Return the summed DPO loss of all pairs, and the sums to report.

    Args:
      ratios_BT: log-probability of each token of an answer minus the reference's, 0 elsewhere.
    """
    beta, smoothing = config.dpo.beta, config.dpo.label_smoothing
    segments, T = batch.segments_BT, ratios_BT.shape[1]
    P = (T + 1) // 2

    def by_segment(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        add = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=2 * P + 1))
        x_BS = add(x_BT, segments)
        return x_BS[:, 1::2], x_BS[:, 2::2]

    lengths_BP = by_segment(batch.weights_BT)
    is_pair_BP = ((lengths_BP[0] > 0) & (lengths_BP[1] > 0)).astype(jnp.float32)
    chosen_BP, rejected_BP = (beta * x_BP for x_BP in by_segment(ratios_BT))
    margin_BP = chosen_BP - rejected_BP
    losses_BP = -(1 - smoothing) * jax.nn.log_sigmoid(margin_BP)
    losses_BP -= smoothing * jax.nn.log_sigmoid(-margin_BP)
    values = {
        "loss": losses_BP,
        "chosen_reward": chosen_BP,
        "rejected_reward": rejected_BP,
        "margin": margin_BP,
        "accuracy": (margin_BP > 0).astype(jnp.float32),
    }
    sums = {name: jnp.sum(value * is_pair_BP) for name, value in values.items()}
    return sums["loss"], sums | {"weights": jnp.sum(is_pair_BP)}


NEXT_TOKEN = Objective(next_token_loss, next_token_metrics)
DPO = Objective(dpo_loss, dpo_metrics)


def objective_of(config: Config) -> Objective:
    """Return the objective that `optimizer.loss` names."""
    return DPO if config.optimizer.loss == "dpo" else NEXT_TOKEN
