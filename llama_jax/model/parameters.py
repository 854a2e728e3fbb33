"""A model's parameters by name and size, without allocating them: counts, FLOPs, its matrices.

Everything derives from the modules themselves, so that a change of the model changes it here too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from llama_jax.config import ModelConfig
from llama_jax.model.layers import Linear
from llama_jax.model.transformer import Llama

EMBEDDING = "embedding"


def abstract(config: ModelConfig) -> Llama:
    """Return the model with `jax.ShapeDtypeStruct`s in place of arrays."""
    return jax.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the leaves of a pytree by dotted name, such as `blocks.attention.wq.kernel`.

    Args:
      is_leaf: as in `jax.tree.leaves`: subtrees for which it is true are leaves themselves.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return {name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, paths)}


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of a model: a linear layer of every block, or a table with a row for each token."""

    name: str  # of its module, such as "blocks.attention.wq" or "embedding"
    inputs: tuple[int, ...]  # such as [D]
    outputs: tuple[int, ...]  # such as [N, H]; of a table [V]
    input_axes: tuple[str, ...]  # logical axes of the inputs, and of the outputs
    output_axes: tuple[str, ...]
    per_layer: bool  # whether each block has one
    count: int  # how many the model has

    @property
    def size(self) -> int:
        """Numbers in one of them."""
        return math.prod(self.inputs) * math.prod(self.outputs)

    @property
    def total(self) -> int:
        """Numbers in all of them."""
        return self.count * self.size


@functools.cache
def matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """Return every matrix of the model, in the order of its modules.

    Norm scales, slopes of heads and the table of positions are none.
    """
    found = []
    leaves = named_leaves(abstract(config), lambda node: isinstance(node, Linear | nnx.Variable))
    for name, leaf in leaves.items():
        if isinstance(leaf, Linear):
            per_layer = len(leaf.kernel.shape) > len(leaf.inputs + leaf.outputs)
            split, axes = len(leaf.inputs), leaf.kernel.axes
            dims = leaf.inputs, leaf.outputs, axes[:split], axes[split:]
        elif leaf.axes[:1] == ("vocab",):  # a table of tokens; that of positions is only added
            per_layer = False
            dims = leaf.shape[1:], leaf.shape[:1], leaf.axes[1:], leaf.axes[:1]
        else:
            continue
        found.append(Matrix(name, *dims, per_layer, config.num_layers if per_layer else 1))
    return tuple(found)


def matmul_parameters(config: ModelConfig) -> int:
    """Return how many parameters each token is multiplied with: all matrices' but one table's.

    The embedding of an untied model is only looked up; of a tied one it is the output matrix too.
    """
    return sum(
        matrix.total
        for matrix in matrices(config)
        if matrix.name != EMBEDDING or config.tied_embeddings
    )


def block_parameters(config: ModelConfig) -> int:
    """Return how many parameters the matrices of one block have."""
    return sum(matrix.size for matrix in matrices(config) if matrix.per_layer)


def table_parameters(config: ModelConfig) -> int:
    """Return how many parameters the output matrix has, which is the embedding where tied."""
    return next(matrix.size for matrix in matrices(config) if matrix.name == EMBEDDING)


def flops_per_token(config: ModelConfig, sequence_length: int, is_frozen: bool = False) -> float:
    """Return the training FLOPs of one token: 6·N + 12·L·H·Q·T.

    Of a frozen model, on which adapters are trained, 4·N + 12·L·H·Q·T: its parameters have no
    gradients. The adapters themselves are not counted.

    From Chowdhery et al. 2022 (PaLM), appendix B. N: parameters but for an untied embedding and
    a table of positions; L: layers; H: query heads; Q: width of a head; T: `sequence_length`. What
    is recomputed to save memory does not count, and attention counts as if no position were masked,
    so that different programs compare.
    """
    looked_up = 0 if config.tied_embeddings else table_parameters(config)
    if config.position == "absolute":
        looked_up += config.context_length * config.dim
    N, L = count_parameters(config) - looked_up, config.num_layers
    H, Q, T = config.num_heads, config.head_size, sequence_length
    return (4 if is_frozen else 6) * N + 12 * L * H * Q * T
