"""Our own checkpoints as a format: read and written layer by layer, never whole.

A converted model becomes a folder like a run's, with step 0 alone: no optimizer, no data, no run.
What is in the folder besides is `description`'s and `checkpoint_layout`'s business.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints import layout
from llama_jax.checkpoints.checksums import partial_checksum
from llama_jax.checkpoints.description import Description, read_description, write_description
from llama_jax.checkpoints.run_folder import TOKENIZER
from llama_jax.checkpoints.steps import folder_and_step, newest_whole
from llama_jax.checkpoints.stored_model import MODEL, stored_model
from llama_jax.errors import UserError
from llama_jax.formats.quantized_weights import float_tensors, quantized_arrays
from llama_jax.formats.stored_array import LastStack, StoredArray
from llama_jax.formats.weights import BLOCKS, DTYPES, Tensor, Weights, of_layer
from llama_jax.instruments.metrics import warn
from llama_jax.model import Llama, abstract
from llama_jax.names import named_leaves
from llama_jax.quantization import Quantization
from llama_jax.text.tokenizer_file import read_model

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
    if step is not None:
        tensors: dict[str, Tensor] | None = _read_step(step, description)
    else:
        tensors = newest_whole(folder, lambda step: _read_step(step, description), report=warn)
    if tensors is None:
        raise UserError(f"{folder} has no finished checkpoint; train for longer, or look elsewhere")
    return Weights(
        config=description.model,
        tensors=tensors,
        tokenizer=read_model(folder / TOKENIZER),
        bos=description.bos,
        is_rounded=description.quantization is not None,
        chat_template=description.chat_template,
    )


def _read_step(step: Path, description: Description) -> dict[str, Tensor]:
    """The tensors of a step."""
    layout.refuse_links(step)
    model = stored_model(step, description)
    try:
        arrays = _stored_arrays(step, model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise layout.damaged(step, error) from error
    if description.quantization is None:
        return {n: t for a in arrays.values() for n, t in _tensors(a).items()}
    whole = {name: Tensor(array.shape, array.dtype, array.read) for name, array in arrays.items()}
    return float_tensors(model, whole)


def _stored_arrays(step: Path, model: Llama) -> dict[str, StoredArray]:
    """The arrays of a step by name, or whatever is raised if one is not as `model` has it."""
    item, last = step / MODEL, LastStack()
    leaves = named_leaves(model)
    sums = layout.read_json(step / META)["checksums"][MODEL]
    if different := leaves.keys() ^ set(layout.names(item)):
        raise ValueError(f"{min(different)} is in one of model and config only")
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
    quantization: Quantization | None = None,
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
    layout.write_json(path / STEP / META, {"checksums": {MODEL: sums}})


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
    weights: Weights, item: Path, quantization: Quantization, report: Report
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
