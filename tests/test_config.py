"""Config dataclasses: validation, derived values, and parsing from nested mappings."""

# ruff: noqa: E501 (a table of mistakes reads best with one to a line)

import dataclasses
import json
import math

import pytest

from llama_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
    as_config_dict,
)
from llama_jax.config_parsing import parse
from llama_jax.errors import UsageError

MODEL = {"vocab_size": 53, "dim": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
MODEL |= {"context_length": 32}
DATA = {"path": "data/x", "batch_size": 8, "sequence_length": 16}
OPTIMIZER = {"steps": 100, "learning_rate": 1e-3, "warmup_steps": 10}
GOOD = {
    ModelConfig: MODEL,
    DataConfig: DATA,
    OptimizerConfig: OPTIMIZER,
    MeshConfig: {},
    RunConfig: {},
    RopeScaling: {},
    LoraConfig: {},
}
REFUSED = [  # class, field, value, part of the message
    *[(ModelConfig, name, 0, f"model.{name}=0 is out of range; expected at least 1") for name in MODEL],
    (LoraConfig, "alpha", 0.0, "lora.alpha=0.0 is out of range; expected from 1e-06 to 1000000"),
    (ModelConfig, "hidden_dim", -1, "model.hidden_dim=-1 is out of range; expected at least 0"),
    (ModelConfig, "multiple_of", 0, "model.multiple_of=0 is out of range; expected at least 1"),
    (ModelConfig, "ffn_dim_multiplier", 0.0, "=0.0 is out of range; expected from 0.001 to 1000"),
    (ModelConfig, "norm_eps", 0.0, "model.norm_eps=0.0 is out of range"),
    (ModelConfig, "norm_eps", math.nan, "model.norm_eps=nan is out of range"),
    (ModelConfig, "rope_theta", 0.5, "model.rope_theta=0.5 is out of range"),
    (ModelConfig, "rope_theta", math.inf, "model.rope_theta=inf is out of range"),
    (ModelConfig, "dropout", 1.0, "model.dropout=1.0 is out of range; expected from 0 to 0.99"),
    (ModelConfig, "dropout", -0.1, "model.dropout=-0.1 is out of range"),
    (ModelConfig, "compute_dtype", "fp16", "'fp16' is unknown; expected one of 'float32', 'bfloat16'"),
    (ModelConfig, "dim", 25, "model.dim=25 does not divide into model.num_heads=6 heads"),
    (ModelConfig, "num_kv_heads", 4, "model.num_heads=6 does not divide over model.num_kv_heads=4"),
    (ModelConfig, "dim", 18, "model.dim=18 / num_heads=6: model.head_dim=3 is odd"),
    (DataConfig, "batch_size", 0, "data.batch_size=0 is out of range"),
    (DataConfig, "sequence_length", 1, "data.sequence_length=1 is out of range"),
    (DataConfig, "seed", -1, "data.seed=-1 is out of range; expected at least 0"),
    (DataConfig, "seed", 2**31, "data.seed=2147483648 is out of range"),
    (DataConfig, "corpus", "wiki", "data.corpus='wiki' is unknown; expected one of '', 'stories'"),
    (DataConfig, "path", "", "data.path is empty"),
    (OptimizerConfig, "steps", 0, "optimizer.steps=0 is out of range"),
    (OptimizerConfig, "learning_rate", -1e-3, "optimizer.learning_rate=-0.001 is out of range"),
    (OptimizerConfig, "min_learning_rate", 11.0, "optimizer.min_learning_rate=11.0 is out of range"),
    (OptimizerConfig, "warmup_steps", -1, "optimizer.warmup_steps=-1 is out of range"),
    (OptimizerConfig, "warmup_steps", 101, "=101 is longer than the run of optimizer.steps=100"),
    (OptimizerConfig, "beta1", 1.0, "optimizer.beta1=1.0 is out of range"),
    (OptimizerConfig, "beta2", -0.1, "optimizer.beta2=-0.1 is out of range"),
    (OptimizerConfig, "eps", 0.0, "optimizer.eps=0.0 is out of range"),
    (OptimizerConfig, "weight_decay", -0.1, "optimizer.weight_decay=-0.1 is out of range"),
    (OptimizerConfig, "clip_norm", -1.0, "optimizer.clip_norm=-1.0 is out of range"),
    (OptimizerConfig, "accumulation_steps", 0, "optimizer.accumulation_steps=0 is out of range"),
    (MeshConfig, "data", 0, "mesh.data=0 is out of range"),
    (MeshConfig, "fsdp", -2, "mesh.fsdp=-2 is out of range"),
    (MeshConfig, "tensor", -1, "mesh.data=-1 and mesh.tensor=-1, but only one axis can take"),
    *[
        (RunConfig, name, 0, f"run.{name}=0 is out of range; expected at least 1")
        for name in ("log_every", "eval_every", "save_every", "keep_last")
    ],
    (RunConfig, "eval_batches", -1, "run.eval_batches=-1 is out of range"),
    (RunConfig, "sample_tokens", -1, "run.sample_tokens=-1 is out of range"),
    (RunConfig, "seed", -1, "run.seed=-1 is out of range"),
    (RunConfig, "remat", "all", "run.remat='all' is unknown; expected one of 'none', 'block', 'save-qkv'"),
    (RunConfig, "checkpoint_dir", "", "run.checkpoint_dir is empty"),
    (RopeScaling, "factor", 0.5, "model.rope_scaling.factor=0.5 is out of range; expected from 1"),
    (RopeScaling, "kind", "longrope", "model.rope_scaling.kind='longrope' is unknown"),
]  # fmt: skip


def test_message_for_two_greedy_mesh_axes_names_the_flags_to_add():
    with pytest.raises(UsageError, match=r"; add --config.mesh.data=1$"):
        MeshConfig(fsdp=-1)
    with pytest.raises(UsageError, match=r"; add --config.mesh.data=1 --config.mesh.fsdp=1$"):
        MeshConfig(fsdp=-1, tensor=-1)


def make_config(data=DATA, optimizer=OPTIMIZER, **sections):
    return Config(
        model=ModelConfig(**MODEL),
        data=DataConfig(**data),
        optimizer=OptimizerConfig(**optimizer),
        **sections,
    )


@pytest.mark.parametrize(("cls", "field", "value", "message"), REFUSED)
def test_invalid_value_is_reported_in_one_line(cls, field, value, message):
    with pytest.raises(UsageError) as refusal:
        cls(**GOOD[cls] | {field: value})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "ffn_dim"),
    [
        (288, 32, 1.0, 768),  # stories15M
        (512, 32, 1.0, 1376),  # stories42M
        (768, 32, 1.0, 2048),  # stories110M
        (4096, 256, 1.0, 11008),  # 7B
        (5120, 256, 1.0, 13824),  # 13B
        (8192, 4096, 1.3, 28672),  # 70B
    ],
)
def test_ffn_dim_matches_known_models(dim, multiple_of, multiplier, ffn_dim):
    rule = {"dim": dim, "multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    assert ModelConfig(**MODEL | rule | {"num_heads": 8}).ffn_dim == ffn_dim


def test_hidden_dim_overrides_computed_ffn_dim():
    assert ModelConfig(**MODEL, hidden_dim=40).ffn_dim == 40


def test_properties_follow_overrides():
    model = dataclasses.replace(ModelConfig(**MODEL), dim=48)
    assert model.head_size == 8
    assert dataclasses.replace(model, head_dim=10).head_size == 10
    config = make_config(optimizer=OPTIMIZER | {"accumulation_steps": 4})
    assert (config.tokens_per_step, config.microbatch_size) == (128, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": OPTIMIZER | {"accumulation_steps": 3}}, "data.batch_size=8 does not divide"),
        ({"data": DATA | {"sequence_length": 33}}, "=33 is longer than model.context_length=32"),
        ({"lora": LoraConfig(rank=4)}, "lora.rank=4 needs a model to start from"),
        ({"lora": LoraConfig(base="nf4")}, "lora.base='nf4' is of frozen weights, and lora.rank=0"),
        (
            {
                "optimizer": OPTIMIZER | {"loss": "dpo", "z_loss": 0.1},
                "run": RunConfig(init_from="x"),
            },
            "optimizer.loss='dpo' needs optimizer.z_loss=0, not 0.1",
        ),
    ],
)
def test_contradicting_sections_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        make_config(**change)


def test_limits_are_inclusive():
    make_config(data=DATA | {"sequence_length": 32}, optimizer=OPTIMIZER | {"warmup_steps": 100})


@pytest.mark.parametrize("cls", GOOD)
def test_configs_are_frozen_and_hashable(cls):
    config = cls(**GOOD[cls])
    hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, 1)


@pytest.mark.parametrize("cls", [*GOOD, Config])
def test_no_field_is_none(cls):
    defaults = [field.default for field in dataclasses.fields(cls)]
    assert None not in defaults


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
    """Return the config as a tree with keys replaced, or removed where the value is `...`."""
    tree = dataclasses.asdict(CONFIG)
    for section, changes in sections.items():
        tree[section] |= changes
        tree[section] = {key: value for key, value in tree[section].items() if value is not ...}
    return tree


def test_round_trip_through_config_dict_and_json():
    assert parse(Config, as_config_dict(CONFIG)) == CONFIG
    assert parse(Config, json.loads(json.dumps(dataclasses.asdict(CONFIG)))) == CONFIG


def test_missing_keys_take_defaults():
    tree = changed(run={"sample_prompt": ...})
    del tree["mesh"]
    assert parse(Config, tree) == dataclasses.replace(CONFIG, mesh=MeshConfig(), run=RunConfig())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed(model={"num_head": 3}), "unknown key 'model.num_head'; did you mean 'num_heads'?"),
        (changed() | {"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'?"),
        (changed(model={"qqqq": 3}), "unknown key 'model.qqqq'"),
        (changed(model={"dim": ...}), "key 'model.dim' is missing; expected an integer"),
        (changed(data={"path": ...}), "key 'data.path' is missing; expected a string"),
        ({}, "key 'model' is missing; expected a section with keys"),
        (changed() | {"mesh": 3}, "mesh=3 has the wrong type; expected a section with keys"),
        (changed(model={"dim": 24.0}), "model.dim=24.0 has the wrong type; expected an integer"),
        (changed(model={"dim": True}), "model.dim=True has the wrong type; expected an integer"),
        (changed(model={"dropout": True}), "model.dropout=True has the wrong type; expected a number"),
        (changed(model={"dropout": "0.1"}), "='0.1' has the wrong type; expected a number"),
        (changed(model={"dropout": None}), "=None has the wrong type; expected a number"),
        (changed(model={"tied_embeddings": 1}), "=1 has the wrong type; expected True or False"),
        (changed(data={"path": 3}), "data.path=3 has the wrong type; expected a string"),
    ],
)  # fmt: skip
def test_parsing_error_names_key_and_type(tree, message):
    with pytest.raises(UsageError) as refusal:
        parse(Config, tree)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_int_is_accepted_for_float():
    rate = parse(Config, changed(optimizer={"learning_rate": 1})).optimizer.learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_parsing_validates():
    with pytest.raises(UsageError, match="dropout=2"):
        parse(Config, changed(model={"dropout": 2}))
