"""Parameters by name and size: names of leaves, the inventory of matrices, FLOPs."""

import pytest

from llama_jax.config import ModelConfig
from llama_jax.model.parameters import (
    block_parameters,
    count_parameters,
    flops_per_token,
    matmul_parameters,
    matrices,
    named_leaves,
    table_parameters,
)

SIZES = {"vocab_size": 53, "dim": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
SIZES |= {"head_dim": 10, "hidden_dim": 40, "context_length": 32}
BLOCK = 2 * 24 * 60 + 2 * 24 * 20 + 3 * 24 * 40  # wq wo, wk wv, gate up down


def test_names_are_dotted():
    assert list(named_leaves({"a": {"b": 1}, "c": [2, 3]})) == ["a.b", "c.0", "c.1"]


def test_a_model_is_named_by_its_attributes(tiny_model):
    names = list(named_leaves(tiny_model))
    assert "embedding" in names and "blocks.attention.wq.kernel" in names
    assert not any("value" in name for name in names)


def test_every_matrix_is_listed_with_its_inputs_and_outputs():
    found = {matrix.name: matrix for matrix in matrices(ModelConfig(**SIZES))}
    tables, layers = {"embedding"}, {"attention.wq", "attention.wk", "attention.wv"}
    layers |= {"attention.wo", "ffn.gate", "ffn.up", "ffn.down"}
    assert found.keys() == tables | {f"blocks.{name}" for name in layers}
    wk, wo = found["blocks.attention.wk"], found["blocks.attention.wo"]
    assert (wk.inputs, wk.outputs, wk.size, wk.total) == ((24,), (2, 10), 480, 1440)
    assert (wo.inputs, wo.outputs, wo.per_layer) == ((6, 10), (24,), True)
    table = found["embedding"]
    assert (table.inputs, table.outputs, table.count, table.per_layer) == ((24,), (53,), 1, False)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_follow_from_the_matrices(tied, layers):
    config = ModelConfig(**SIZES | {"num_layers": layers}, tied_embeddings=tied)
    table = 53 * 24
    assert table_parameters(config) == table
    assert block_parameters(config) == BLOCK
    assert matmul_parameters(config) == table + layers * BLOCK
    norms = (2 * layers + 1) * 24
    assert count_parameters(config) == (1 if tied else 2) * table + layers * BLOCK + norms


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_formula_and_an_embedding_only_looked_up_takes_none(tied):
    config = ModelConfig(**SIZES, tied_embeddings=tied)
    attention = 12 * 3 * 6 * 10 * 11  # layers, heads, their width, tokens
    parameters = 53 * 24 + 3 * BLOCK + 7 * 24
    assert flops_per_token(config, 11) == 6 * parameters + attention
    assert flops_per_token(config, 11, is_frozen=True) == 4 * parameters + attention
