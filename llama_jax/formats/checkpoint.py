"""One array of a checkpoint, promised layer by layer and checked against its checksum.

Knows how much of it has to be read at a time, not what it is for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoints import layout
from llama_jax.checkpoints.layout import damaged
from llama_jax.checkpoints.load import MODEL, abstract_model
from llama_jax.checkpoints.metadata import Description, read_description, write_description
from llama_jax.checkpoints.restore import folder_and_step, read_checkpoint
from llama_jax.checkpoints.run_folder import TOKENIZER, require_tokenizer
from llama_jax.checkpoints.save import partial_checksum
from llama_jax.errors import UserError
from llama_jax.formats.weights import BLOCKS, DTYPES, Tensor, Weights, of_layer, tensor_shapes
from llama_jax.model.parameters import abstract, named_leaves
from llama_jax.model.transformer import Llama
from llama_jax.quantization import (
    QuantizationConfig,
    QuantizedLinear,
    QuantizedMatrix,
    abstract_quantized,
    quantize_kernel,
)
from llama_jax.text.tokenizer import read_model


class LastStack:
    """The one array that was read whole for the sake of its layers and may be asked for more."""

    def __init__(self) -> None:
        self.name, self.array = "", np.zeros(0)

    def forget(self) -> None:
        """Let the memory go."""
        self.__init__()  # type: ignore[misc]


class StoredArray:
    """An array of a step; reading raises `UserError` when its bits are not what was written."""

    def __init__(self, step: Path, name: str, array: Any, checksum: int, last: LastStack) -> None:
        self.step, self.name, self._array, self._checksum = step, name, array, checksum
        self._last = last
        self._sums: dict[int, int] = {}  # of the layers read so far
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(array.dtype.numpy_dtype)

    def read(self) -> np.ndarray:
        """All of it."""
        whole = self._read(...)
        self._verify(partial_checksum(whole))
        return whole

    def read_layer(self, layer: int) -> np.ndarray:
        """One layer; of an array that is not stored in layers all is read and kept until the next.

        Weights are used kind by kind, so the others are asked for soon.
        """
        if self._array.chunk_layout.read_chunk.shape[0] > 1:
            if self._last.name != self.name:
                self._last.forget()  # before the next is read: never two at once
                self._last.array, self._last.name = self.read(), self.name
            return self._last.array[layer]
        part = self._read(layer)
        self._sums[layer] = partial_checksum(part, layer * part.size)
        if len(self._sums) == self.shape[0]:
            self._verify(sum(self._sums.values()) % 2**32)
        return part

    def _read(self, index: Any) -> np.ndarray:
        try:
            return self._array[index].read().result()
        except (OSError, ValueError) as error:
            raise damaged(self.step, error) from error

    def _verify(self, found: int) -> None:
        if found != self._checksum:
            why = f"checksum of {self.name} differs; name an older step if there is one"
            raise damaged(self.step, why)


# Float tensors, as formats know them, to and from the integers that our checkpoints may hold.
#
# Matrix by matrix: never is more in memory than one and what is made of it.


def quantized_arrays(
    weights: Weights, quantization: QuantizationConfig
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
    parts = quantize_kernel(kernel, matrix.outputs, matrix.group_size)
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


# Our own checkpoints as a format: read and written layer by layer, never whole.
#
# A converted model becomes a folder like a run's, with step 0 alone: no optimizer, no data, no run.
# `checkpoints.metadata` and `checkpoints.layout` know what else is in the folder.

STEP, META = "0", "meta"
Report = Callable[[int], None]


def read(path: Path) -> Weights:
    """The model of a checkpoint folder's newest whole step, or of the step that a path names.

    Names, shapes and dtypes are verified here, bits by their checksum as soon as all of an array
    was read. A damaged step is reported and passed over for the one before it. Of a quantised
    model, the tensors are the floats that its integers stand for.

    Raises:
      UserError: when there is no whole step.
    """
    folder, step = folder_and_step(path)
    description = read_description(folder)
    read = partial(_read_step, description=description)
    tensors, meta = read_checkpoint(folder, step, read)
    require_tokenizer(folder, meta)
    return Weights(
        config=description.model,
        tensors=tensors,
        tokenizer=read_model(folder / TOKENIZER),
        bos=description.bos,
        is_rounded=description.quantization is not None,
        chat_template=description.chat_template,
    )


StepContent = tuple[dict[str, Tensor], dict[str, Any]]


def _read_step(step: Path, description: Description) -> StepContent:
    """Return the tensors of a step and its metadata."""
    layout.refuse_links(step)
    model = abstract_model(step, description)
    try:
        meta = layout.read_json(step / META)
        arrays = _stored_arrays(step, model, meta["checksums"][MODEL])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise layout.damaged(step, error) from error
    if description.quantization is None:
        return {n: t for a in arrays.values() for n, t in _tensors(a).items()}, meta
    whole = {name: Tensor(array.shape, array.dtype, array.read) for name, array in arrays.items()}
    return float_tensors(model, whole), meta


def _stored_arrays(step: Path, model: Llama, sums: dict[str, int]) -> dict[str, StoredArray]:
    """The arrays of a step by name, or whatever is raised if one is not as `model` has it."""
    item, last = step / MODEL, LastStack()
    leaves = named_leaves(model)
    if different := leaves.keys() ^ set(layout.names(item)):
        raise ValueError(f"{min(different)} is in only one of checkpoint and config.json")
    if unsummed := leaves.keys() - sums.keys():
        raise ValueError(f"the checksum of {min(unsummed)} is missing")
    arrays = {}
    for name, leaf in leaves.items():
        array = layout.open_array(item, name, leaf.shape, np.dtype(leaf.dtype))
        arrays[name] = StoredArray(step, name, array, sums[name], last)
    return arrays


def _tensors(array: StoredArray) -> dict[str, Tensor]:
    """The promises of a stored array, one a layer where it has layers."""
    shape, dtype = array.shape, array.dtype
    if not array.name.startswith(BLOCKS):
        return {array.name: Tensor(shape, dtype, array.read)}
    return {
        of_layer(array.name, layer): Tensor(
            shape[1:],
            dtype,
            lambda layer=layer: array.read_layer(layer),  # type: ignore[misc]
        )
        for layer in range(shape[0])
    }


def write(
    weights: Weights,
    path: Path,
    *,
    quantization: QuantizationConfig | None = None,
    report: Report = lambda done: None,
) -> None:
    """Write a model as step 0 of a new checkpoint folder, its matrices as integers if asked to.

    Raises:
      UserError: when it has no tokenizer.
    """
    if not weights.tokenizer:
        raise UserError("the model has no tokenizer, without which a checkpoint is not complete")
    item = path / STEP / MODEL
    item.mkdir(parents=True)
    description = Description(
        model=weights.config,
        bos=weights.bos,
        eos=False,  # nothing but our own runs knows, and those learn from BOS alone unless told
        quantization=quantization,
        chat_template=weights.chat_template,
    )
    write_description(path, description)
    (path / TOKENIZER).write_bytes(weights.tokenizer)
    if quantization is None:
        shapes, sums = _write_floats(weights, item, report)
    else:
        shapes, sums = _write_integers(weights, item, quantization, report)
    layout.write_names(item, shapes)
    tokenizer = layout.file_checksum(path / TOKENIZER)
    layout.write_json(path / STEP / META, {"checksums": {MODEL: sums}, TOKENIZER: tokenizer})


Written = tuple[dict[str, tuple[int, ...]], dict[str, int]]  # shapes and checksums by name


def _write_floats(weights: Weights, item: Path, report: Report) -> Written:
    shapes, sums, done = {}, {}, 0
    for name, leaf in named_leaves(abstract(weights.config)).items():
        shapes[name], sums[name] = leaf.shape, 0
        array, parts = _new_array(item, weights, name, leaf.shape)
        for index, start, tensor in parts:
            part = np.ascontiguousarray(tensor.read())
            array[index].write(part).result()
            sums[name] += partial_checksum(part, start)
            report(done := done + tensor.nbytes)
            del part
        sums[name] %= 2**32
    return shapes, sums


def _write_integers(
    weights: Weights, item: Path, quantization: QuantizationConfig, report: Report
) -> Written:
    shapes, sums, done = {}, {}, 0
    for size, arrays in quantized_arrays(weights, quantization):
        for name, whole in arrays.items():
            shapes[name], sums[name] = whole.shape, partial_checksum(whole)
            array = layout.create_array(item, name, whole.shape, whole.shape, whole.dtype)
            array[...].write(whole).result()
        report(done := done + size)
    return shapes, sums


Part = tuple[Any, int, Tensor]  # index in the array, place of the first element, the numbers


def _new_array(
    item: Path, weights: Weights, name: str, shape: tuple[int, ...]
) -> tuple[Any, Iterator[Part]]:
    """A new array, and what is to be written into it."""
    if not name.startswith(BLOCKS):
        tensor = weights.tensors[name]
        return layout.create_array(item, name, shape, shape, tensor.dtype), iter([(..., 0, tensor)])
    tensors = [weights.tensors[of_layer(name, layer)] for layer in range(shape[0])]
    dtypes = {tensor.dtype for tensor in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
    array = layout.create_array(item, name, shape, (1, *shape[1:]), dtype)
    size = int(np.prod(shape[1:], dtype=np.int64))
    parts = ((layer, layer * size, tensor.astype(dtype)) for layer, tensor in enumerate(tensors))
    return array, parts
