"""Lazy tensors and weights: names, shapes, dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest
from tiny_weights import tiny_weights

from llama_jax.config import ModelConfig
from llama_jax.formats.weights import DTYPES, Tensor, of_layer, tensor_shapes
from llama_jax.model.parameters import count_parameters

BF16 = np.dtype(ml_dtypes.bfloat16)
LLAMA2_7B = {"vocab_size": 32000, "dim": 4096, "num_layers": 32, "num_heads": 32}
LLAMA2_7B |= {"num_kv_heads": 32, "context_length": 4096, "tied_embeddings": False}


def test_shapes_are_ordered_by_kind_and_layer():
    shapes = tensor_shapes(tiny_weights().config)
    queries = [name for name in shapes if ".wq." in name]
    assert queries == [f"blocks.{layer}.attention.wq.kernel" for layer in range(3)]
    first = list(shapes).index(queries[0])
    assert list(shapes)[first : first + 3] == queries
    assert shapes["blocks.2.attention.wq.kernel"] == (24, 6, 4)
    assert shapes["blocks.0.attention.wk.kernel"] == (24, 2, 4)
    assert shapes["blocks.1.attention.wo.kernel"] == (6, 4, 24)
    assert shapes["blocks.1.ffn.down.kernel"] == (40, 24)
    assert shapes["blocks.1.ffn_norm.scale"] == (24,)
    assert (shapes["embedding"], shapes["norm.scale"]) == ((283, 24), (24,))
    assert "output" not in shapes


def test_an_untied_model_has_an_output_matrix():
    assert tensor_shapes(tiny_weights(tied_embeddings=False).config)["output"] == (283, 24)


def test_the_shapes_of_a_real_model_have_all_its_parameters():
    config = ModelConfig(**LLAMA2_7B)
    sizes = [math.prod(shape) for shape in tensor_shapes(config).values()]
    assert sum(sizes) == count_parameters(config) == 6_738_415_616


def test_names_of_layers():
    assert of_layer("blocks.ffn.up.kernel", 3) == "blocks.3.ffn.up.kernel"


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_nbytes_reads_nothing(dtype, size):
    assert Tensor((7, 11), DTYPES[dtype], None).nbytes == 77 * size
    assert Tensor((), DTYPES[dtype], None).nbytes == size
    assert Tensor((2**20, 2**20), DTYPES[dtype], None).nbytes == 2**40 * size


def test_tensors_are_cast_when_read():
    reads = []

    def read():
        reads.append(1)
        return np.array([1.0, 1.001, -3.14159], np.float32)

    tensor = Tensor((3,), np.dtype(np.float32), read)
    assert tensor.astype(np.dtype(np.float32)) is tensor
    rounded = tensor.astype(BF16)
    assert (rounded.shape, rounded.dtype, reads) == ((3,), BF16, [])
    assert rounded.read().dtype == BF16
    assert rounded.read().tolist() == [1.0, 1.0, -3.140625]
    assert len(reads) == 2


def test_weights_are_cast():
    weights = tiny_weights()
    rounded = weights.astype(BF16)
    assert (weights.dtype, rounded.dtype) == (np.float32, BF16)
    assert rounded.config == weights.config
    assert rounded.tokenizer == weights.tokenizer
    for name, tensor in weights.tensors.items():
        np.testing.assert_array_equal(
            rounded.tensors[name].read(), tensor.read().astype(ml_dtypes.bfloat16)
        )


def test_the_dtype_is_that_of_the_matrices():
    weights = tiny_weights(dtype="bfloat16")
    norm = weights.tensors["norm.scale"].astype(np.dtype(np.float32))
    mixed = dict(weights.tensors) | {"norm.scale": norm}
    assert type(weights)(config=weights.config, tensors=mixed, tokenizer=b"").dtype == BF16
