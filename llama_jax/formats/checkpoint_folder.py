"""Our own checkpoints as a format: read and written layer by layer, never whole.

A converted model becomes a folder like a run's, with step 0 alone: no optimizer, no data, no run.
What is in the folder besides is `description`'s and `checkpoint_layout`'s business.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import checkpoint_layout as layout
from llama_jax.checksums import partial_checksum
from llama_jax.config import ModelConfig
from llama_jax.description import Description, read_description, write_description
from llama_jax.errors import UserError
from llama_jax.formats.stored_array import LastStack, StoredArray
from llama_jax.formats.weights import BLOCKS, DTYPES, Tensor, Weights, of_layer
from llama_jax.metrics import warn
from llama_jax.model import abstract, count_parameters
from llama_jax.names import named_leaves
from llama_jax.run_folder import TOKENIZER
from llama_jax.steps import folder_and_step, newest_whole
from llama_jax.tokenizer_file import read_model

STEP, MODEL, META = "0", "model", "meta"


def read(path: Path) -> Weights:
    """The model of a checkpoint folder's newest whole step, or of the step that a path names.

    Names, shapes and dtypes are verified here, bits by their checksum as soon as all of an array
    was read. A damaged step is reported and passed over for the one before it.

    Raises:
      UserError: when there is no whole step.
    """
    folder, step = folder_and_step(path)
    description = read_description(folder)
    config = description.model
    if step is not None:
        tensors: dict[str, Tensor] | None = _read_step(step, config)
    else:
        tensors = newest_whole(folder, lambda step: _read_step(step, config), report=warn)
    if tensors is None:
        raise UserError(f"{folder} has no finished checkpoint; train for longer, or look elsewhere")
    tokenizer = read_model(folder / TOKENIZER)
    return Weights(config=config, tensors=tensors, tokenizer=tokenizer, bos=description.bos)


def _read_step(step: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a step."""
    layout.refuse_links(step)
    item, last = step / MODEL, LastStack()
    tensors: dict[str, Tensor] = {}
    try:
        layout.require_plausible(item, count_parameters(config))
        shapes = {name: leaf.shape for name, leaf in named_leaves(abstract(config)).items()}
        sums = layout.read_json(step / META)["checksums"][MODEL]
        found = layout.names(item)
        if different := shapes.keys() ^ set(found):
            raise ValueError(f"{min(different)} is in one of model and config only")
        if unsummed := shapes.keys() - sums.keys():
            raise ValueError(f"the checksum of {min(unsummed)} is missing")
        for name, shape in shapes.items():
            array = StoredArray(step, name, layout.open_array(item, name, shape), sums[name], last)
            tensors |= _tensors(array, name.startswith(BLOCKS))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise layout.damaged(step, error) from error
    return tensors


def _tensors(array: StoredArray, is_stacked: bool) -> dict[str, Tensor]:
    """The promises of a stored array, one a layer where it has layers."""
    shape, dtype = array.shape, array.dtype
    if not is_stacked:
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
    weights: Weights, path: Path, *, report: Callable[[int], None] = lambda done: None
) -> None:
    """Write a model as step 0 of a new checkpoint folder.

    Raises:
      UserError: when it has no tokenizer.
    """
    if not weights.tokenizer:
        raise UserError("the model has no tokenizer, without which a checkpoint is not complete")
    item = path / STEP / MODEL
    item.mkdir(parents=True)
    eos = False  # nothing but our own runs knows, and those learn from BOS alone unless told
    write_description(path, Description(model=weights.config, bos=weights.bos, eos=eos))
    (path / TOKENIZER).write_bytes(weights.tokenizer)
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
    layout.write_names(item, shapes)
    layout.write_json(path / STEP / META, {"checksums": {MODEL: sums}})


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
