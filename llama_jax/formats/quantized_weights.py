"""Float tensors, as formats know them, to and from the integers that our checkpoints may hold.

Matrix by matrix: never is more in memory than one and what is made of it.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.formats.weights import DTYPES, Tensor, Weights, tensor_shapes
from llama_jax.model import Llama
from llama_jax.names import named_leaves
from llama_jax.quantization import (
    Quantization,
    QuantizedLinear,
    QuantizedMatrix,
    abstract_quantized,
    rounded,
)


def quantized_arrays(
    weights: Weights, quantization: Quantization
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """What stands for each tensor of a float model: its bytes as floats, and arrays by name.

    Bit by bit those of `quantization.quantize`.
    """
    small = abstract_quantized(weights.config, quantization.kind, quantization.group_size)
    matrices = _matrices(small)
    for name in tensor_shapes(weights.config):
        tensor = weights.tensors[name]
        if name in matrices:
            yield tensor.nbytes, _rounded(*matrices[name], jnp.array(tensor.read()))
        else:
            yield tensor.nbytes, {name: tensor.read()}


def float_tensors(small: Llama, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, float32 where they were quantised, that stored arrays stand for.

    Args:
      small: the quantised model with shapes in place of arrays.
      stored: its arrays by name.
    """
    matrices, tensors = _matrices(small), {}
    for name, shape in tensor_shapes(small.config).items():
        if name in matrices:
            read = partial(_floats, *matrices[name], shape, stored)
            tensors[name] = Tensor(shape, DTYPES["float32"], read)
        else:
            tensors[name] = stored[name]
    return tensors


def _matrices(small: Llama) -> dict[str, tuple[str, QuantizedMatrix]]:
    """The matrices of a quantised model and their names, by those of the float tensors."""

    def is_matrix(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedMatrix)

    leaves = named_leaves(small, is_matrix)
    return {
        f"{name}.kernel" if isinstance(leaf, QuantizedLinear) else name: (name, leaf)
        for name, leaf in leaves.items()
        if is_matrix(leaf)
    }


def _rounded(name: str, matrix: QuantizedMatrix, kernel: jax.Array) -> dict[str, np.ndarray]:
    if isinstance(matrix, QuantizedLinear):  # float layers have their inputs first
        kernel = kernel.reshape(math.prod(matrix.inputs), -1).T
        kernel = kernel.reshape(matrix.outputs + matrix.inputs)
    parts = rounded(kernel, matrix.outputs, matrix.group_size)
    return {f"{name}.{part}": np.asarray(array) for part, array in parts.items()}


def _floats(
    name: str, matrix: QuantizedMatrix, shape: tuple[int, ...], stored: Mapping[str, Tensor]
) -> np.ndarray:
    parts = [jnp.asarray(stored[f"{name}.{part}"].read()) for part in named_leaves(matrix)]
    filled = jax.tree.unflatten(jax.tree.structure(matrix), parts)
    kernel = np.asarray(filled.floats(jnp.dtype(jnp.float32)))
    if isinstance(matrix, QuantizedLinear):
        kernel = kernel.reshape(math.prod(matrix.outputs), -1).T
    return np.ascontiguousarray(kernel.reshape(shape))
