"""The names of a tree's leaves, by which checkpoints and foreign formats know a model's arrays."""

from collections.abc import Callable
from typing import Any

import jax


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of any tree by dotted name, such as `blocks.attention.wq.kernel`.

    What `is_leaf` accepts is one leaf, whatever is in it.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return {name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, paths)}
