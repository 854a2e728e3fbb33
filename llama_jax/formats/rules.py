"""How the tensors of another project correspond to ours: rules as data, used in both directions.

A format is a table of rules. Import applies a rule's layout and export its inverse; import refuses
a source unless every foreign tensor is used once and every one of ours is found.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.weights import Tensor, tensor_shapes

MAX_LISTED = 8  # names in a message
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of ours, of a given shape, is stored by another project."""

    their_shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray, Shape], np.ndarray]


def _matrix(input_dims: int, interleaved: bool = False) -> Layout:
    """Theirs is [outputs, inputs]; in ours the first `input_dims` dims are inputs."""

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
    """Reorder the rows [heads·H, D] of `wq` or `wk` from interleaved rotary pairs to halves.

    Meta, llama2.c and GGUF rotate rows 2i and 2i + 1 of a head together; we, like Hugging Face,
    rows i and i + H/2.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo `to_halves`."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _bias(interleaved: bool = False) -> Layout:
    """Theirs is [outputs]; ours has the outputs' dims."""

    def to_ours(array: np.ndarray, shape: Shape) -> np.ndarray:
        rows = to_halves(array[:, None], shape[-1]) if interleaved else array
        return rows.reshape(shape)

    def to_theirs(array: np.ndarray, shape: Shape) -> np.ndarray:
        rows = array.reshape(-1, 1)
        return (to_interleaved(rows, shape[-1]) if interleaved else rows).reshape(-1)

    return Layout(lambda shape: (math.prod(shape),), to_ours, to_theirs)


AS_IS = Layout(lambda shape: shape, lambda array, _: array, lambda array, _: array)
MATRIX = _matrix(1)
HEADS_IN = _matrix(2)  # of `wo`, whose inputs are [N, H]
INTERLEAVED = _matrix(1, interleaved=True)
BIAS, INTERLEAVED_BIAS = _bias(), _bias(interleaved=True)
KERNEL, WEIGHT = ".kernel", ".weight"  # in place of which a bias's name has ".bias"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor here and there; `{layer}` stands for a layer's number in both names."""

    ours: str
    theirs: str
    layout: Layout = AS_IS


Table = tuple[Rule, ...]


def make_table(names: Mapping[str, str], interleaved: bool) -> Table:
    """Return the rules of a format that stores linear layers as [outputs, inputs].

    A linear layer has a rule for its bias too, which is used where a model has one.

    Args:
      names: theirs by ours, in the order of the format.
      interleaved: whether rotary pairs are, in `wq` and `wk`.
    """
    rotated = (INTERLEAVED, INTERLEAVED_BIAS) if interleaved else (MATRIX, BIAS)
    layouts = {"wq": rotated, "wk": rotated, "wo": (HEADS_IN, BIAS)}
    rules = []
    for ours, theirs in names.items():
        if not ours.endswith(KERNEL):
            rules.append(Rule(ours, theirs))
            continue
        matrix, bias = layouts.get(ours.split(".")[-2], (MATRIX, BIAS))
        rules.append(Rule(ours, theirs, matrix))
        rules.append(Rule(ours.replace(KERNEL, ".bias"), theirs.replace(WEIGHT, ".bias"), bias))
    return tuple(rules)


def beyond_llama2(config: ModelConfig) -> list[str]:
    """Return what a config has that Llama 2 has not, as "name=value", for formats without it."""
    found = []
    if config.head_size * config.num_heads != config.dim:
        found.append(f"head_dim={config.head_size}")
    if config.position != "rope":
        found.append(f"position={config.position}")
    if config.rope_scaling.kind != "none":
        found.append(f"rope_scaling={config.rope_scaling.kind}")
    found += [f"{name}=True" for name in ("attention_bias", "mlp_bias") if vars(config)[name]]
    if 0 < config.sliding_window < config.context_length:
        found.append(f"sliding_window={config.sliding_window}")
    return found


def expanded(table: Table, config: ModelConfig) -> list[Rule]:
    """Return a rule for each tensor of a model, all layers of a kind before the next kind."""
    ours = tensor_shapes(config)
    rules = [
        dataclasses.replace(
            rule, ours=rule.ours.format(layer=layer), theirs=rule.theirs.format(layer=layer)
        )
        for rule in table
        for layer in range(config.num_layers if "{layer}" in rule.ours else 1)
    ]
    return [rule for rule in rules if rule.ours in ours]  # a tied model has no output matrix


def import_tensors(
    table: Table,
    config: ModelConfig,
    foreign: Mapping[str, Tensor],
    source: object,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Tensor]:
    """Return our tensors, made from foreign ones when they are read.

    Args:
      foreign: by their names.
      source: what an error calls the place they come from.
      ignored: whether a foreign tensor is not needed, such as `rope.freqs`.

    Raises:
      UserError: one line listing all foreign tensors that are missing, unknown or misshapen.
    """
    rules, shapes = expanded(table, config), tensor_shapes(config)
    expected = {rule.theirs: rule.layout.their_shape(shapes[rule.ours]) for rule in rules}
    problems = []
    for what, names in (
        ("missing", [name for name in expected if name not in foreign]),
        ("unknown", [name for name in foreign if name not in expected and not ignored(name)]),
    ):
        if names:
            problems.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {what}")
    misshapen = [
        f"{name} is {list(foreign[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in foreign and foreign[name].shape != shape
    ]
    problems += [_listed(misshapen)] if misshapen else []
    if problems:
        raise UserError(f"{source} does not hold this Llama's tensors: {'; '.join(problems)}")

    def lazy(rule: Rule) -> Tensor:
        tensor, shape = foreign[rule.theirs], shapes[rule.ours]
        return Tensor(shape, tensor.dtype, lambda: rule.layout.to_ours(tensor.read(), shape))

    return {rule.ours: lazy(rule) for rule in rules}


def export_tensors(
    table: Table, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return foreign tensors by name, made from ours when read, in the order of the table."""
    rules, shapes = expanded(table, config), tensor_shapes(config)
    left = shapes.keys() - {rule.ours for rule in rules}
    assert not left, f"no rule writes {sorted(left)}"

    def lazy(rule: Rule) -> Tensor:
        tensor, shape = tensors[rule.ours], shapes[rule.ours]
        return Tensor(
            rule.layout.their_shape(shape),
            tensor.dtype,
            lambda: np.ascontiguousarray(rule.layout.to_theirs(tensor.read(), shape)),
        )

    return {rule.theirs: lazy(rule) for rule in rules}


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest
