"""The names of a tree's leaves."""

from llama_jax.model.parameters import named_leaves


def test_names_are_dotted():
    assert list(named_leaves({"a": {"b": 1}, "c": [2, 3]})) == ["a.b", "c.0", "c.1"]


def test_a_model_is_named_by_its_attributes(tiny_model):
    names = list(named_leaves(tiny_model))
    assert "embedding" in names and "blocks.attention.wq.kernel" in names
    assert not any("value" in name for name in names)
