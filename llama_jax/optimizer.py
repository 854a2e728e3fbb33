"""AdamW as llama2.c uses it: warm-up, cosine, clipping, decay on matrices only."""

from typing import TypeVar

import jax
import optax
from flax import nnx

from llama_jax.config import OptimizerConfig

Tree = TypeVar("Tree")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Step → learning rate: from 0 linearly to the peak, then a cosine to the minimum.

    As in llama2.c the rate at step 0 is exactly 0 when there is a warm-up.
    """
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(1, config.steps - config.warmup_steps),
        alpha=config.min_learning_rate / config.learning_rate if config.learning_rate else 0.0,
    )
    if config.warmup_steps == 0:
        return decay
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, decay], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of a run; its moments are shaped and sharded like the parameters."""
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    if config.clip_norm == 0.0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def is_matrix(model: Tree) -> Tree:
    """True for each parameter described by two axes or more: those that weight decay acts on.

    The layer dim of stacked blocks is not an axis, so norm scales are never taken for matrices.
    """
    return jax.tree.map(
        lambda parameter: len(parameter.axes) >= 2,
        model,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
