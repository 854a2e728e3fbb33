"""Random models that are small, as weights; sizes differ pairwise, so a swapped dim cannot pass."""

import jax
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.formats.weights import DTYPES, Tensor, Weights, of_layer, tensor_shapes
from llama_jax.model.parameters import abstract, named_leaves

SIZES = {
    "vocab_size": 283,
    "dim": 24,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "hidden_dim": 40,
    "context_length": 32,
}


def tiny_vocabulary(size=SIZES["vocab_size"]):
    """Control pieces, the 256 bytes, ▁, and merges of a few letters."""
    pieces = [Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("<s>", 0.0, Kind.CONTROL)]
    pieces += [Piece("</s>", 0.0, Kind.CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
    merges = ["▁a", "ab", "▁ab", "abc", "▁b", "bc"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = merges[: size - len(pieces) - 8]
    letters = letters[: size - len(pieces) - len(merges)]
    pieces += [Piece(text, -float(rank)) for rank, text in enumerate([*merges, *letters])]
    return Vocabulary(pieces=tuple(pieces))


def tiny_weights(dtype="float32", seed=0, tokenizer=None, **changes):
    """A model with every tensor drawn anew; norms around 1. `changes` are of `ModelConfig`."""
    config = ModelConfig(**SIZES | changes)
    random = np.random.default_rng(seed)

    def tensor(name, shape):
        array = random.standard_normal(shape).astype(np.float32) * 0.2 + ("norm" in name)
        array = array.astype(DTYPES[dtype])
        return Tensor(shape, array.dtype, lambda: array)

    tensors = {name: tensor(name, shape) for name, shape in tensor_shapes(config).items()}
    if tokenizer is None:
        tokenizer = tiny_vocabulary(config.vocab_size).to_model()
    return Weights(config=config, tensors=tensors, tokenizer=tokenizer)


def same(one, other):
    """Assert that two models have the same tensors, bit for bit, and the same dtypes."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        left, right = tensor.read(), other.tensors[name].read()
        assert (left.shape, left.dtype) == (right.shape, right.dtype), name
        assert (left.shape, left.dtype) == (tensor.shape, tensor.dtype), name
        assert left.tobytes() == right.tobytes(), name


def built(weights):
    """The model that weights describe, in memory, stacked and in float32."""
    model = abstract(weights.config)

    def array(name):
        names = [name] if name in weights.tensors else []
        names = names or [of_layer(name, layer) for layer in range(weights.config.num_layers)]
        arrays = [weights.tensors[name].read().astype(np.float32) for name in names]
        return jax.numpy.asarray(arrays[0] if name in weights.tensors else np.stack(arrays))

    leaves = [array(name) for name in named_leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)
