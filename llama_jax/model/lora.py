"""Low-rank adapters (LoRA, Hu et al. 2021): a small trainable addition to frozen matrices.

An adapted layer computes base(x) + scale · (dropout(x) · a) · b, with a [*inputs, R] and
b [R, *outputs]. Adapters are kept beside the model they belong to, as `Adapters`: the base is never
changed, and may be stored as floats or quantized. `attach` gives the model that has both.

R: rank of the adapters.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config import LoraConfig, ModelConfig
from llama_jax.errors import did_you_mean, require
from llama_jax.model.execution import Execution
from llama_jax.model.layers import Linear, dropout, embed, unembed
from llama_jax.model.parameters import Matrix, matrices
from llama_jax.model.transformer import ONE_DEVICE, Block, Llama

# By module name, such as "blocks.attention.wq": its "a" and its "b". Those of blocks are stacked,
# with a leading layer dim.
Adapters = dict[str, dict[str, nnx.Param]]

LINEAR = "linear"  # the target that means every linear layer of the blocks
BLOCK_PARTS = ("attention", "ffn")  # that have linear layers
DROPOUT_STREAM = 0x10A  # folded into the key of a step, whose other parts the model uses


class LoraLinear(nnx.Module):
    """A linear layer, plain or quantized, with an adapter."""

    def __init__(
        self,
        base: Any,
        adapter: Mapping[str, nnx.Param],
        scale: float,
        rate: float = 0.0,
        key: jax.Array | None = None,
        execution: Execution = ONE_DEVICE,
    ):
        self.inputs, self.outputs = base.inputs, base.outputs
        self.base, self.a, self.b = base, adapter["a"], adapter["b"]
        self.scale, self.rate, self.execution = scale, rate, execution
        if key is not None:
            self.key = nnx.data(key)  # a leaf: NNX would take a typed key for a static value

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.shape[: x.ndim - len(self.inputs)]
        dropped = dropout(x, self.rate, getattr(self, "key", None), self.execution.example_ids)
        a_IR = self.a[...].astype(x.dtype).reshape(math.prod(self.inputs), -1)
        b_RO = self.b[...].astype(x.dtype).reshape(a_IR.shape[1], -1)
        added = (dropped.reshape(-1, a_IR.shape[0]) @ a_IR) @ b_RO
        return self.base(x) + self.scale * added.reshape(rows + self.outputs)


class LoraTable(nnx.Module):
    """An embedding or output matrix [V, D] with an adapter: a [V, R], b [R, D]."""

    def __init__(
        self,
        base: Any,
        adapter: Mapping[str, nnx.Param],
        scale: float,
        execution: Execution = ONE_DEVICE,
    ):
        self.base, self.a, self.b = base, adapter["a"], adapter["b"]
        self.scale, self.execution = scale, execution

    def rows(self, ids: jax.Array, dtype: jnp.dtype, lookup: Callable[..., jax.Array]) -> jax.Array:
        """Return the embeddings [*ids, D] of tokens."""
        b_RD = self.execution.gathered(self.b, dtype)[...].astype(dtype)
        added = self.a[...][ids].astype(dtype) @ b_RD
        return embed(self.base, ids, dtype, lookup) + self.scale * added

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """Return the matrix [V, D] that the table and its adapter amount to."""
        base = self.base[...] if isinstance(self.base, nnx.Param) else self.base.floats(dtype)
        return (base + self.scale * (self.a[...] @ self.b[...])).astype(dtype)

    def __call__(self, x_RD: jax.Array) -> jax.Array:
        """Return float32 logits, a row of V for each of x."""
        added = (x_RD @ self.b[...].astype(x_RD.dtype).T) @ self.a[...].astype(x_RD.dtype).T
        return unembed(x_RD, self.base) + self.scale * added.astype(jnp.float32)


# ---- which matrices ----


def targets(config: ModelConfig, lora: LoraConfig) -> list[Matrix]:
    """Return the matrices that `lora.targets` names, in the order of the model.

    Raises:
      UsageError: for a name that is no matrix of the model, or a rank above the smallest dim.
    """
    found = {matrix.name: matrix for matrix in matrices(config)}
    short = {name.rpartition(".")[2]: name for name in found}
    chosen: set[str] = set()
    for target in (part.strip() for part in lora.targets.split(",")):
        tied = target == "output" and config.tied_embeddings
        hint = ", the embedding is the output matrix" if tied else did_you_mean(target, short)
        names = {name for name in found if found[name].per_layer}
        names = names if target == LINEAR else {short[target]} if target in short else set()
        expected = f"expected {LINEAR} or names among {', '.join(short)}"
        require(
            bool(names), f"lora.targets has {target!r}, which matches nothing{hint}; {expected}"
        )
        chosen |= names
    matched = [matrix for matrix in found.values() if matrix.name in chosen]
    for matrix in matched:
        least = min(math.prod(matrix.inputs), math.prod(matrix.outputs))
        smaller = f"the {least} of {matrix.name}'s smaller dim"
        require(lora.rank <= least, f"lora.rank={lora.rank} is more than {smaller}; lower it")
    return matched


def init_adapters(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapters:
    """Return adapters that change nothing yet, drawn from `key`.

    As in PEFT, one factor is 0 and the other uniform within ±1/√(its inputs): b is 0 in a linear
    layer, a in a table.
    """
    adapters: Adapters = {}
    for index, matrix in enumerate(targets(config, lora)):
        inputs, outputs = matrix.inputs, matrix.outputs
        first_axes, last_axes = matrix.input_axes, matrix.output_axes
        if not matrix.per_layer:  # a table's rows are looked up: its outputs come first
            inputs, outputs, first_axes, last_axes = outputs, inputs, last_axes, first_axes
        layers = (config.num_layers,) if matrix.per_layer else ()
        a_shape, b_shape = (*layers, *inputs, lora.rank), (*layers, lora.rank, *outputs)
        bound = 1 / math.sqrt(math.prod(matrix.inputs))
        draw = partial(jax.random.uniform, jax.random.fold_in(key, index), minval=-bound)
        a = draw(a_shape, maxval=bound) if matrix.per_layer else jnp.zeros(a_shape)
        b = jnp.zeros(b_shape) if matrix.per_layer else draw(b_shape, maxval=bound)
        adapters[matrix.name] = {
            "a": nnx.Param(a, axes=(*first_axes, "rank")),
            "b": nnx.Param(b, axes=("rank", *last_axes)),
        }
    return adapters


def scale_of(lora: LoraConfig) -> float:
    """Return the factor of what adapters add."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


# ---- a model with adapters ----


def attach(
    model: Llama,
    adapters: Adapters,
    lora: LoraConfig,
    *,
    key: jax.Array | None = None,
    execution: Execution = ONE_DEVICE,
) -> Llama:
    """Return the model with adapters in its layers; `model` is unchanged, and shares its arrays.

    Args:
      model: stacked or unstacked; its matrices may be quantized.
      key: of the dropout of adapters; None: nothing is dropped.
      execution: as for `Llama.hidden`.
    """
    adapted = jax.tree.map(lambda leaf: leaf, model)
    rate, scale = lora.dropout if key is not None else 0.0, scale_of(lora)
    for index, (name, adapter) in enumerate(adapters.items()):
        if not name.startswith("blocks."):
            table = LoraTable(getattr(model, name), adapter, scale, execution)
            setattr(adapted, name, table)
            continue
        keys_L = None
        if key is not None and rate:
            own = jax.random.fold_in(key, DROPOUT_STREAM + index)
            keys_L = jax.random.split(own, model.config.num_layers)
        for block, layer in _layers(adapted):
            part, attribute = _place(block, name)
            own_adapter, own_key = _slice((adapter, keys_L), layer)
            base = getattr(part, attribute)
            new = LoraLinear(base, own_adapter, scale, rate, own_key, execution)
            setattr(part, attribute, new)
    return adapted


def detach(model: Llama) -> Llama:
    """Return the model that adapters were attached to; `model` is unchanged."""
    plain = jax.tree.map(lambda leaf: leaf, model)
    blocks = [plain.blocks] if isinstance(plain.blocks, Block) else list(plain.blocks)
    for part in (plain, *(getattr(block, name) for block in blocks for name in BLOCK_PARTS)):
        for name, layer in list(vars(part).items()):
            if isinstance(layer, LoraLinear | LoraTable):
                setattr(part, name, layer.base)
    return plain


def merge(model: Llama, adapters: Adapters, lora: LoraConfig) -> Llama:
    """Return a plain model whose matrices have the adapters added; `model` is unchanged.

    Raises:
      UsageError: if the model is quantized: rounding again would lose much of what was learned.
    """
    merged = jax.tree.map(lambda leaf: leaf, model)
    for name, adapter in adapters.items():
        if not name.startswith("blocks."):
            table = getattr(model, name)
            _require_float(table, nnx.Param)
            floats = LoraTable(table, adapter, scale_of(lora)).floats(jnp.dtype(jnp.float32))
            new = nnx.Param(floats.astype(table.dtype), axes=table.axes)
            setattr(merged, name, new)
            continue
        for block, layer in _layers(merged):
            part, attribute = _place(block, name)
            linear, own = getattr(part, attribute), _slice(adapter, layer)
            _require_float(linear, Linear)
            kernel = merged_kernel(linear, own, scale_of(lora))
            linear.kernel = nnx.Param(kernel, axes=linear.kernel.axes)
    return merged


def merged_kernel(linear: Linear, adapter: Mapping[str, nnx.Param], scale: float) -> jax.Array:
    """Return a kernel, or a stack of them, with an adapter added in float32, in its own dtype."""
    kernel, a, b = linear.kernel[...], adapter["a"][...], adapter["b"][...]
    layers, R = kernel.shape[: kernel.ndim - len(linear.inputs + linear.outputs)], a.shape[-1]
    added = a.reshape(*layers, -1, R) @ b.reshape(*layers, R, -1)
    wide = kernel.astype(jnp.float32) + scale * added.reshape(kernel.shape)
    return wide.astype(kernel.dtype)


def _require_float(layer: Any, expected: type) -> None:
    require(
        isinstance(layer, expected),
        "the base is quantized, and merging adapters would round it again; merge them onto the"
        " model that it was quantized from",
    )


def _layers(model: Llama) -> Iterator[tuple[Block, int | None]]:
    """Yield the stacked blocks, or each block with its layer."""
    if isinstance(model.blocks, Block):
        yield model.blocks, None
    else:
        yield from ((block, layer) for layer, block in enumerate(model.blocks))


def _place(block: Block, name: str) -> tuple[nnx.Module, str]:
    """Return the part of a block and the attribute of it that a name means."""
    _, part, attribute = name.split(".")
    return getattr(block, part), attribute


def _slice(tree: Any, layer: int | None) -> Any:
    """Return the arrays of one layer of a stacked tree; of None the tree itself."""
    return tree if layer is None else jax.tree.map(lambda array: array[layer], tree)
