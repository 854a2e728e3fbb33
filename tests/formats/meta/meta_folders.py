"""Small untied models in Meta's format, and changes to them."""

import json

import pytest
from tiny_weights import tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats.meta import model as meta
from llama_jax.formats.torch import reader as torch_file
from llama_jax.formats.torch import writer as torch_writer

MANY_HEADS = {"dim": 96, "num_heads": 16, "num_kv_heads": 8, "vocab_size": 288}


def untied(dtype="float32", **changes):
    return tiny_weights(dtype, tied_embeddings=False, **changes)


def rewrite(path, change):
    """Write a .pth anew, its arrays changed by a function of the dict of them."""
    arrays = {name: tensor.read().copy() for name, tensor in torch_file.read(path).items()}
    change(arrays)
    path.unlink()
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with torch_writer.Writer(path, described) as writer:
        for array in arrays.values():
            writer.add(array)


def set_params(folder, remove=(), **changes):
    path = folder / "params.json"
    params = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: params[name] for name in params if name not in remove}))


def refused(path, *words, **arguments):
    with pytest.raises(UserError) as caught:
        meta.read(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message
