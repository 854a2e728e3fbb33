"""Our own checkpoints as a format, read and written layer by layer, or matrix by matrix.

A converted model becomes a folder like that of a training run, with step 0 alone and without
optimizer, data or run. `checkpoints.metadata` and `checkpoints.layout` define its other contents.
"""

import dataclasses
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
from llama_jax.checkpoints.load import BASE, MODEL, abstract_model
from llama_jax.checkpoints.metadata import Description, read_description, write_description
from llama_jax.checkpoints.restore import folder_and_step, read_checkpoint
from llama_jax.checkpoints.run_folder import require_tokenizer
from llama_jax.checkpoints.save import partial_checksum
from llama_jax.errors import UserError
from llama_jax.formats.tokenizer_files import fit_rows, read_tokenizer_file
from llama_jax.formats.weights import BLOCKS, DTYPES, Tensor, Weights, of_layer, tensor_shapes
from llama_jax.model.lora import Adapters
from llama_jax.model.parameters import abstract, named_leaves
from llama_jax.model.transformer import Llama
from llama_jax.quantization import (
    QuantizationConfig,
    QuantizedLinear,
    QuantizedMatrix,
    abstract_quantized,
    quantize_kernel,
)
from llama_jax.text.tokenizer import read_file, save_tokenizer, tokenizer_path

STEP, META = "0", "meta"
Report = Callable[[int], None]


def read(path: Path, tokenizer: Path | None = None) -> Weights:
    """Return the model of a checkpoint folder's newest readable step, or of the step at a path.

    Names, shapes and dtypes are verified here, an array's checksum when all of it has been read. A
    damaged step is reported, and the one before it read. The tensors of a quantised model are
    dequantised.

    Args:
      tokenizer: a file to use instead of the folder's own, which is not looked at then.

    Raises:
      UserError: if no step is readable, or the tokenizer is missing or another model's.
    """
    folder, step = folder_and_step(path)
    description = read_description(folder)
    if description.lora.rank:
        raise UserError(
            f"{folder} holds adapters, not a model; add --merge to convert their base with them, or"
            " --to peft to write them alone"
        )
    read = partial(_read_step, description=description)
    tensors, meta = read_checkpoint(folder, step, read)
    rows = description.model.vocab_size
    if tokenizer:
        content = read_tokenizer_file(tokenizer, rows)
    else:
        require_tokenizer(folder, meta)
        content = fit_rows(read_file(tokenizer_path(folder)), rows, folder)
    return Weights(
        config=description.model,
        tensors=tensors,
        tokenizer=content,
        bos=description.bos,
        is_rounded=description.quantization is not None,
        chat_template=description.chat_template,
        stop_ids=description.stop_ids,
        generation=description.generation,
    )


def _read_step(step: Path, description: Description) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a step, and its metadata."""
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
        return {n: t for a in arrays.values() for n, t in a.tensors().items()}, meta
    whole = {name: Tensor(array.shape, array.dtype, array.read) for name, array in arrays.items()}
    return _dequantized(model, whole), meta


def _stored_arrays(step: Path, model: Llama, sums: dict[str, int]) -> dict[str, "_StoredArray"]:
    """Return the arrays of a step by name; raise anything if one is not as in `model`."""
    item, cache = step / MODEL, _StackCache()
    leaves = named_leaves(model)
    if different := leaves.keys() ^ set(layout.names(item)):
        raise ValueError(f"{min(different)} is in only one of checkpoint and config.json")
    if unsummed := leaves.keys() - sums.keys():
        raise ValueError(f"the checksum of {min(unsummed)} is missing")
    arrays = {}
    for name, leaf in leaves.items():
        array = layout.open_array(item, name, leaf.shape, np.dtype(leaf.dtype))
        arrays[name] = _StoredArray(step, name, array, sums[name], cache)
    return arrays


class _StackCache:
    """The one stacked array in memory, kept since its other layers are usually read next."""

    name, array = "", np.zeros(0)


class _StoredArray:
    """An array of a step; reading raises `UserError` if its checksum differs."""

    def __init__(self, step: Path, name: str, array: Any, checksum: int, cache: _StackCache):
        self.step, self.name, self._array, self._checksum = step, name, array, checksum
        self._cache = cache
        self._sums: dict[int, int] = {}  # of the layers read so far
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(array.dtype.numpy_dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the lazy tensor, or one for each layer."""
        if not self.name.startswith(BLOCKS):
            return {self.name: Tensor(self.shape, self.dtype, self.read)}
        return {
            of_layer(self.name, layer): Tensor(
                self.shape[1:], self.dtype, partial(self._read_layer, layer)
            )
            for layer in range(self.shape[0])
        }

    def read(self) -> np.ndarray:
        """Return the whole array."""
        whole = self._read(...)
        self._verify(partial_checksum(whole))
        return whole

    def _read_layer(self, layer: int) -> np.ndarray:
        if self._array.chunk_layout.read_chunk.shape[0] > 1:  # not stored layer by layer
            cache = self._cache
            if cache.name != self.name:
                cache.name, cache.array = "", np.zeros(0)  # freed first: never two in memory
                cache.array, cache.name = self.read(), self.name
            return cache.array[layer]
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


def write(
    weights: Weights,
    path: Path,
    *,
    quantization: QuantizationConfig | None = None,
    report: Report = lambda done: None,
) -> None:
    """Write a model as step 0 of a new checkpoint folder, with quantised matrices if requested.

    Raises:
      UserError: if it has no tokenizer.
    """
    if not weights.tokenizer:
        raise UserError("the model has no tokenizer, without which a checkpoint is not complete")
    description = Description(
        model=weights.config,
        bos=weights.bos,
        eos=False,  # only runs record it, and their documents have no EOS by default
        quantization=quantization,
        chat_template=weights.chat_template,
        stop_ids=weights.stop_ids,
        generation=dict(weights.generation),
    )
    parts = _float_parts(weights) if quantization is None else _int_parts(weights, quantization)
    _write_folder(path, description, weights.tokenizer, parts, report)


def write_adapters(
    path: Path, description: Description, adapters: Adapters, base: str, tokenizer: bytes
) -> None:
    """Write adapters as step 0 of a new folder.

    Args:
      description: of the model that they belong to, with its `lora` and `base`.
      base: the fingerprint of that model's parameters.
      tokenizer: content of its tokenizer file.
    """
    parts: Iterator[Part] = (
        (name, leaf.shape, None, np.asarray(leaf), leaf.nbytes)
        for name, leaf in named_leaves(adapters).items()
    )
    _write_folder(path, description, tokenizer, parts, lambda done: None, {BASE: base})


def _write_folder(
    path: Path,
    description: Description,
    tokenizer: bytes,
    parts: Iterator["Part"],
    report: Report,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder with step 0 alone; `meta` is added to the step's metadata."""
    item = path / STEP / MODEL
    item.mkdir(parents=True)
    write_description(path, description)
    tokenizer_file = save_tokenizer(tokenizer, path)
    shapes: dict[str, tuple[int, ...]] = {}
    sums: dict[str, int] = {}
    done = 0
    for name, shape, layer, array, size in parts:
        if name not in shapes:
            chunk = shape if layer is None else (1, *shape[1:])
            with layout.write_errors(path):
                stored = layout.create_array(item, name, shape, chunk, array.dtype)
            shapes[name], sums[name] = shape, 0
        with layout.write_errors(path):
            stored[... if layer is None else layer].write(array).result()
        sums[name] = (sums[name] + partial_checksum(array, (layer or 0) * array.size)) % 2**32
        report(done := done + size)
        del array
    layout.write_names(item, shapes)
    checksums: dict[str, Any] = {"checksums": {MODEL: sums}}
    checksums |= {tokenizer_file.name: layout.file_checksum(tokenizer_file)}
    layout.write_json(path / STEP / META, {**checksums, **(meta or {})})


# What is written at a time: the name and shape of a stored array, a layer of it or None for all,
# the numbers, and the bytes of float tensors that they are made of.
Part = tuple[str, tuple[int, ...], int | None, np.ndarray, int]


def _float_parts(weights: Weights) -> Iterator[Part]:
    for name, leaf in named_leaves(abstract(weights.config)).items():
        if not name.startswith(BLOCKS):
            tensor = weights.tensors[name]
            yield name, leaf.shape, None, np.ascontiguousarray(tensor.read()), tensor.nbytes
            continue
        tensors = [weights.tensors[of_layer(name, layer)] for layer in range(leaf.shape[0])]
        dtypes = {tensor.dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
        for layer, tensor in enumerate(tensors):
            tensor = tensor.astype(dtype)  # no array is bound here, so that it can be freed
            yield name, leaf.shape, layer, np.ascontiguousarray(tensor.read()), tensor.nbytes


def _int_parts(weights: Weights, quantization: QuantizationConfig) -> Iterator[Part]:
    """Yield the arrays of the quantised model, equal to those of `quantization.quantize`."""
    small = abstract_quantized(weights.config, *dataclasses.astuple(quantization))
    matrices = _matrices(small)
    for name in tensor_shapes(weights.config):
        tensor = weights.tensors[name]
        if name in matrices:
            arrays = _quantized(*matrices[name], jnp.array(tensor.read()))
        else:
            arrays = {name: tensor.read()}
        for number, (part, array) in enumerate(arrays.items()):
            yield part, array.shape, None, array, 0 if number else tensor.nbytes
        del arrays, array  # before the next tensor is read


# ---- quantised matrices ----


def _matrices(small: Llama) -> dict[str, tuple[str, QuantizedMatrix]]:
    """Return the matrices of a quantised model and their names, by the names of float tensors."""

    def is_matrix(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedMatrix)

    return {
        f"{name}.kernel" if isinstance(leaf, QuantizedLinear) else name: (name, leaf)
        for name, leaf in named_leaves(small, is_matrix).items()
        if is_matrix(leaf)
    }


def _quantized(name: str, matrix: QuantizedMatrix, kernel: jax.Array) -> dict[str, np.ndarray]:
    if isinstance(matrix, QuantizedLinear):  # float kernels have their inputs first
        kernel = kernel.reshape(math.prod(matrix.inputs), -1).T
        kernel = kernel.reshape(matrix.outputs + matrix.inputs)
    parts = quantize_kernel(kernel, matrix.outputs, matrix.quantization)
    return {f"{name}.{part}": np.asarray(array) for part, array in parts.items()}


def _dequantized(small: Llama, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a quantised model, its matrices as float32.

    Args:
      small: the model with shapes in place of arrays.
      stored: its arrays by name.
    """

    def read(name: str, matrix: QuantizedMatrix, shape: tuple[int, ...]) -> np.ndarray:
        parts = [jnp.asarray(stored[f"{name}.{part}"].read()) for part in named_leaves(matrix)]
        filled = jax.tree.unflatten(jax.tree.structure(matrix), parts)
        kernel = np.asarray(filled.floats(jnp.dtype(jnp.float32)))
        if isinstance(matrix, QuantizedLinear):
            kernel = kernel.reshape(math.prod(matrix.outputs), -1).T
        return np.ascontiguousarray(kernel.reshape(shape))

    matrices = _matrices(small)
    return {
        name: Tensor(shape, DTYPES["float32"], partial(read, *matrices[name], shape))
        if name in matrices
        else stored[name]
        for name, shape in tensor_shapes(small.config).items()
    }
