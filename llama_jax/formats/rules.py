"""How another project's tensors and ours correspond: rules that are data, used in both directions.

A format is a table of rules. Reading applies each layout, writing its inverse, and an audit holds
both sides to account: every foreign tensor used once, every one of ours filled.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.weights import Tensor, tensor_shapes

LISTED = 8  # names shown of each kind of problem
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of a shape of ours lies in a foreign file; `to_theirs` undoes `to_ours`."""

    their_shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray, Shape], np.ndarray]


def _matrix(input_dims: int, interleaved: bool = False) -> Layout:
    """Theirs is [outputs, inputs]; ours has the first `input_dims` dims in, the rest out."""

    def their_shape(shape: Shape) -> Shape:
        return math.prod(shape[input_dims:]), math.prod(shape[:input_dims])

    def to_ours(array: np.ndarray, shape: Shape) -> np.ndarray:
        array = to_halves(array, shape[-1]) if interleaved else array
        return array.T.reshape(shape)

    def to_theirs(array: np.ndarray, shape: Shape) -> np.ndarray:
        array = array.reshape(their_shape(shape)[::-1]).T
        return to_interleaved(array, shape[-1]) if interleaved else array

    return Layout(their_shape, to_ours, to_theirs)


def to_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads·H, D] with rotated pairs side by side → the two members in the halves of a head.

    Meta, llama2.c and GGUF turn rows 2i and 2i + 1 of a head together; we, like Hugging Face, turn
    i and i + H/2.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `to_halves`."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


AS_IS = Layout(lambda shape: shape, lambda array, _: array, lambda array, _: array)
MATRIX = _matrix(1)
HEADS_IN = _matrix(2)  # of `wo`, whose inputs are [N, H]
INTERLEAVED = _matrix(1, interleaved=True)  # of `wq` and `wk` where pairs lie side by side


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor here and there; `{layer}` stands for a layer's number in both names."""

    ours: str
    theirs: str
    layout: Layout = AS_IS


Table = tuple[Rule, ...]


def expanded(table: Table, config: ModelConfig) -> list[Rule]:
    """The rules of one model: a rule a tensor, kind by kind; that of an output it ties left out."""
    ours = tensor_shapes(config)
    rules = [
        dataclasses.replace(
            rule, ours=rule.ours.format(layer=layer), theirs=rule.theirs.format(layer=layer)
        )
        for rule in table
        for layer in range(config.num_layers if "{layer}" in rule.ours else 1)
    ]
    return [rule for rule in rules if rule.ours in ours]


def import_tensors(
    table: Table,
    config: ModelConfig,
    foreign: Mapping[str, Tensor],
    source: object,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Tensor]:
    """Our tensors, promised from foreign ones.

    Args:
      foreign: by their names.
      source: what an error calls the place they come from.
      ignored: whether a foreign tensor is superfluous by design, such as `rope.freqs`.

    Raises:
      UserError: one line listing all foreign tensors that are missing, unknown or misshapen.
    """
    rules, shapes = expanded(table, config), tensor_shapes(config)
    known = {rule.theirs for rule in rules}
    expected = {rule.theirs: rule.layout.their_shape(shapes[rule.ours]) for rule in rules}
    wrong = [
        f"{name} is {list(foreign[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in foreign and foreign[name].shape != shape
    ]
    missing = [name for name in expected if name not in foreign]
    unknown = [name for name in foreign if name not in known and not ignored(name)]
    complaints = [
        _some(names) + (_are(names) + what if what else "")
        for what, names in (("missing", missing), ("unknown", unknown), ("", wrong))
        if names
    ]
    if complaints:
        raise UserError(f"{source} does not hold this Llama's tensors: {'; '.join(complaints)}")

    def promise(rule: Rule) -> Tensor:
        tensor, shape = foreign[rule.theirs], shapes[rule.ours]
        return Tensor(shape, tensor.dtype, lambda: rule.layout.to_ours(tensor.read(), shape))

    return {rule.ours: promise(rule) for rule in rules}


def export_tensors(
    table: Table, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Foreign tensors by their names, promised from ours, in the order of the table."""
    shapes = tensor_shapes(config)

    def promise(rule: Rule) -> Tensor:
        tensor, shape = tensors[rule.ours], shapes[rule.ours]
        return Tensor(
            rule.layout.their_shape(shape),
            tensor.dtype,
            lambda: np.ascontiguousarray(rule.layout.to_theirs(tensor.read(), shape)),
        )

    rules = expanded(table, config)
    left = shapes.keys() - {rule.ours for rule in rules}
    assert not left, f"no rule writes {sorted(left)}"
    return {rule.theirs: promise(rule) for rule in rules}


def _some(names: Sequence[str]) -> str:
    """Names in a line, the first few of many."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def _are(names: Sequence[str]) -> str:
    return " is " if len(names) == 1 else " are "
