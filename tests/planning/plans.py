"""A small config whose sizes differ pairwise, shared by the tests of planning."""

import dataclasses

from llama_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

MODEL = {"vocab_size": 96, "dim": 48, "num_layers": 3, "num_heads": 12, "num_kv_heads": 4}
MODEL |= {"context_length": 40, "hidden_dim": 80, "tied_embeddings": False}
SECTIONS = {"model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig}
SECTIONS |= {"mesh": MeshConfig, "run": RunConfig, "lora": LoraConfig}


def make_config(**changes):
    """Return a config; `run__remat="block"` changes one setting."""
    values = {"model": dict(MODEL), "mesh": {}, "run": {"remat": "none"}, "lora": {}}
    values["data"] = {"path": "tokens", "batch_size": 16, "sequence_length": 32}
    values["optimizer"] = {"steps": 10, "learning_rate": 0.01, "warmup_steps": 0}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return Config(**{name: cls(**values[name]) for name, cls in SECTIONS.items()})


def changed(config, section, **values):
    """Return the config with some settings of one section changed."""
    new = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: new})
