"""Layouts against loops written by hand, and the checks of import and export."""

import ml_dtypes
import numpy as np
import pytest
from tiny_weights import same, tiny_weights

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.rules import (
    AS_IS,
    BIAS,
    HEADS_IN,
    INTERLEAVED,
    INTERLEAVED_BIAS,
    MATRIX,
    Rule,
    expanded,
    export_tensors,
    import_tensors,
    to_halves,
    to_interleaved,
)
from llama_jax.formats.weights import Tensor, Weights

D, N, H = 5, 3, 8  # a head of 4 could not tell the permutation from its inverse
SHAPES = {
    "as it is": (AS_IS, (7,), (7,)),
    "embedding": (AS_IS, (7, D), (7, D)),
    "matrix": (MATRIX, (D, 7), (7, D)),
    "heads out": (MATRIX, (D, N, H), (N * H, D)),
    "heads in": (HEADS_IN, (N, H, D), (D, N * H)),
    "interleaved": (INTERLEAVED, (D, N, H), (N * H, D)),
    "bias": (BIAS, (N, H), (N * H,)),
    "interleaved bias": (INTERLEAVED_BIAS, (N, H), (N * H,)),
}
TABLE = (
    Rule("embedding", "table"),
    Rule("blocks.{layer}.attention.wq.kernel", "{layer}/q", INTERLEAVED),
    Rule("blocks.{layer}.attention.wk.kernel", "{layer}/k", INTERLEAVED),
    Rule("blocks.{layer}.attention.wv.kernel", "{layer}/v", MATRIX),
    Rule("blocks.{layer}.attention.wo.kernel", "{layer}/o", HEADS_IN),
    Rule("blocks.{layer}.ffn.gate.kernel", "{layer}/gate", MATRIX),
    Rule("blocks.{layer}.ffn.up.kernel", "{layer}/up", MATRIX),
    Rule("blocks.{layer}.ffn.down.kernel", "{layer}/down", MATRIX),
    Rule("blocks.{layer}.attention_norm.scale", "{layer}/norm1"),
    Rule("blocks.{layer}.ffn_norm.scale", "{layer}/norm2"),
    Rule("norm.scale", "norm"),
    Rule("output", "head"),
)


def numbers(shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_layout_has_an_inverse(kind, dtype):
    layout, ours, theirs = SHAPES[kind]
    assert layout.their_shape(ours) == theirs
    there = layout.to_theirs(numbers(ours, dtype), ours)
    assert (there.shape, there.dtype) == (theirs, dtype)
    np.testing.assert_array_equal(layout.to_ours(there, ours), numbers(ours, dtype))
    here = layout.to_ours(numbers(theirs, dtype), ours)
    assert (here.shape, here.dtype) == (ours, dtype)
    np.testing.assert_array_equal(layout.to_theirs(here, ours), numbers(theirs, dtype))


def test_a_matrix_of_theirs_has_its_outputs_first():
    theirs = numbers((N * H, D))
    ours = MATRIX.to_ours(theirs, (D, N, H))
    for d in range(D):
        for n in range(N):
            for h in range(H):
                assert ours[d, n, h] == theirs[n * H + h, d]


def test_the_matrix_behind_attention_takes_heads_in():
    theirs = numbers((D, N * H))
    ours = HEADS_IN.to_ours(theirs, (N, H, D))
    for n in range(N):
        for h in range(H):
            for d in range(D):
                assert ours[n, h, d] == theirs[d, n * H + h]


def test_interleaved_pairs_become_halves():
    theirs = numbers((N * H, D))
    ours = INTERLEAVED.to_ours(theirs, (D, N, H))
    for d in range(D):
        for n in range(N):
            for pair in range(H // 2):
                assert ours[d, n, pair] == theirs[n * H + 2 * pair, d]
                assert ours[d, n, pair + H // 2] == theirs[n * H + 2 * pair + 1, d]


def test_a_bias_is_ordered_like_the_rows_of_its_matrix():
    shape = (1, N, H)
    column = numbers((N * H, 1))
    expected = INTERLEAVED.to_ours(column, shape)[0]
    np.testing.assert_array_equal(INTERLEAVED_BIAS.to_ours(column[:, 0], (N, H)), expected)


def test_halves_and_interleaved_rows_by_hand():
    rows = np.arange(12).reshape(12, 1)  # two heads of 6
    halves = [[0], [2], [4], [1], [3], [5], [6], [8], [10], [7], [9], [11]]
    assert to_halves(rows, 6).tolist() == halves
    assert to_interleaved(np.array(halves), 6).tolist() == rows.tolist()
    assert to_halves(np.array(halves), 6).tolist() != rows.tolist()


def test_rules_are_expanded_kind_by_kind():
    config = tiny_weights().config
    assert config.tied_embeddings
    names = [rule.theirs for rule in expanded(TABLE, config)]
    assert names[:5] == ["table", "0/q", "1/q", "2/q", "0/k"]
    assert names[-2:] == ["2/norm2", "norm"]
    assert len(names) == 2 + 9 * 3


def test_an_output_matrix_is_expanded_where_there_is_one():
    rules = expanded(TABLE, tiny_weights(tied_embeddings=False).config)
    assert (rules[-1].ours, rules[-1].theirs) == ("output", "head")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_importing_what_was_exported_is_the_identity(tied, dtype):
    weights = tiny_weights(dim=48, tied_embeddings=tied, dtype=dtype)
    theirs = export_tensors(TABLE, weights.config, weights.tensors)
    assert theirs["1/q"].shape == (48, 48)
    assert theirs["1/k"].shape == (16, 48)
    ours = import_tensors(TABLE, weights.config, theirs, "here")
    same(weights, Weights(config=weights.config, tensors=ours, tokenizer=b""))


def test_exported_tensors_are_in_c_order_and_in_the_order_of_the_table():
    weights = tiny_weights()
    theirs = export_tensors(TABLE, weights.config, weights.tensors)
    assert list(theirs) == [rule.theirs for rule in expanded(TABLE, weights.config)]
    assert all(tensor.read().flags.c_contiguous for tensor in theirs.values())


def test_a_table_without_a_rule_for_a_tensor_fails():
    weights = tiny_weights()
    with pytest.raises(AssertionError, match=r"no rule writes \['norm\.scale'\]"):
        export_tensors(TABLE[:-2], weights.config, weights.tensors)


def foreign(config, read=None):
    """A whole model by foreign names, of which each reading is `read`."""
    weights = tiny_weights()
    theirs = export_tensors(TABLE, config, weights.tensors)
    return {
        name: Tensor(tensor.shape, tensor.dtype, read or tensor.read)
        for name, tensor in theirs.items()
    }


def test_tensors_are_read_lazily():
    def read():
        raise AssertionError("read")

    config = tiny_weights().config
    ours = import_tensors(TABLE, config, foreign(config, read), "here")
    theirs = export_tensors(TABLE, config, ours)
    with pytest.raises(AssertionError, match=r"^read$"):
        theirs["norm"].read()


def test_all_problems_are_listed_in_one_line():
    config = tiny_weights().config
    tensors = foreign(config)
    del tensors["1/k"], tensors["norm"]
    tensors["2/q"] = Tensor((24, 23), np.dtype(np.float32), lambda: None)
    tensors["2/bias"] = tensors["rope"] = tensors["table"]
    with pytest.raises(UserError) as caught:
        import_tensors(TABLE, config, tensors, "x.bin", lambda name: name == "rope")
    message = str(caught.value)
    assert message.startswith("x.bin does not hold this Llama's tensors: ")
    assert "1/k, norm are missing" in message
    assert "2/bias is unknown" in message
    assert "2/q is [24, 23], expected [24, 24]" in message
    assert "rope" not in message
    assert "\n" not in message


def test_an_output_matrix_beside_a_tied_embedding_is_unknown():
    config = tiny_weights().config
    tensors = foreign(config)
    tensors["head"] = tensors["table"]
    with pytest.raises(UserError, match="head is unknown"):
        import_tensors(TABLE, config, tensors, "here")
    assert import_tensors(TABLE, config, tensors, "here", lambda name: name == "head")


def test_the_first_of_many_missing_tensors_are_named():
    config = ModelConfig(**vars(tiny_weights().config) | {"num_layers": 40})
    with pytest.raises(UserError) as caught:
        import_tensors(TABLE, config, {}, "here")
    assert "table, 0/q, 1/q" in str(caught.value)
    assert f"and {2 + 9 * 40 - 8} more are missing" in str(caught.value)
    assert len(str(caught.value)) < 200
