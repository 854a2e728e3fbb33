"""Configs to plain mappings and back, and what is refused on the way."""

# ruff: noqa: E501 (a table of mistakes reads best with one to a line)

import dataclasses
import json

import pytest

from llama_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    as_config_dict,
    parse,
)
from llama_jax.errors import UsageError

CONFIG = Config(
    model=ModelConfig(
        vocab_size=53,
        dim=24,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        context_length=32,
        tied_embeddings=False,
    ),
    data=DataConfig(path="data/x", batch_size=8, sequence_length=16),
    optimizer=OptimizerConfig(steps=100, learning_rate=1e-3, warmup_steps=10),
    mesh=MeshConfig(data=4, tensor=2),
    run=RunConfig(sample_prompt="Once"),
)


def changed(**sections):
    """The config's tree with keys replaced, or dropped where the value is `...`."""
    tree = dataclasses.asdict(CONFIG)
    for section, changes in sections.items():
        tree[section] |= changes
        tree[section] = {key: value for key, value in tree[section].items() if value is not ...}
    return tree


def test_there_and_back_is_the_identity():
    assert parse(Config, as_config_dict(CONFIG)) == CONFIG
    assert parse(Config, json.loads(json.dumps(dataclasses.asdict(CONFIG)))) == CONFIG


def test_keys_left_out_take_their_defaults():
    tree = changed(run={"sample_prompt": ...})
    del tree["mesh"]
    assert parse(Config, tree) == dataclasses.replace(CONFIG, mesh=MeshConfig(), run=RunConfig())


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (changed(model={"num_head": 3}), "unknown key 'model.num_head'; did you mean 'num_heads'?"),
        (changed() | {"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'?"),
        (changed(model={"qqqq": 3}), "unknown key 'model.qqqq'"),
        (changed(model={"dim": ...}), "key 'model.dim' is missing; expected a whole number"),
        (changed(data={"path": ...}), "key 'data.path' is missing; expected a text"),
        ({}, "key 'model' is missing; expected a section with keys"),
        (changed() | {"mesh": 3}, "mesh=3 has the wrong type; expected a section with keys"),
        (changed(model={"dim": 24.0}), "model.dim=24.0 has the wrong type; expected a whole number"),
        (changed(model={"dim": True}), "model.dim=True has the wrong type; expected a whole number"),
        (changed(model={"dropout": True}), "model.dropout=True has the wrong type; expected a number"),
        (changed(model={"dropout": "0.1"}), "='0.1' has the wrong type; expected a number"),
        (changed(model={"dropout": None}), "=None has the wrong type; expected a number"),
        (changed(model={"tied_embeddings": 1}), "=1 has the wrong type; expected True or False"),
        (changed(data={"path": 3}), "data.path=3 has the wrong type; expected a text"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_line(tree, says):
    with pytest.raises(UsageError) as refusal:
        parse(Config, tree)
    assert str(refusal.value).startswith(says) or says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_whole_number_will_do_for_a_number():
    rate = parse(Config, changed(optimizer={"learning_rate": 1})).optimizer.learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_parsing_validates():
    with pytest.raises(UsageError, match="dropout=2"):
        parse(Config, changed(model={"dropout": 2}))
