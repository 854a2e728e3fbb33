"""Errors of a run that cannot be sharded over a mesh, with the nearest size that can."""

import pytest

from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from llama_jax.distributed.mesh import require_fitting
from llama_jax.errors import UsageError

SIZES = {"vocab_size": 56, "dim": 48, "num_heads": 12, "num_kv_heads": 2, "hidden_dim": 40}


def make_config(batch_size=24, accumulation=1, sequence=False, length=10, **model):
    model = SIZES | {"num_layers": 2, "context_length": 32} | model
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(path="nowhere", batch_size=batch_size, sequence_length=length),
        optimizer=OptimizerConfig(
            steps=9, learning_rate=1e-3, warmup_steps=1, accumulation_steps=accumulation
        ),
        mesh=MeshConfig(sequence=sequence),
    )


def over(data=1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize("sizes", [over(), over(8), over(2, 3, 4), over(1, 24), over(6, 1, 4)])
def test_what_divides_is_accepted(sizes):
    require_fitting(make_config(), sizes)


def test_fewer_kv_heads_than_the_tensor_axis_are_accepted():
    require_fitting(make_config(num_kv_heads=1), over(tensor=4))


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        ({}, over(tensor=8), "model.num_heads=12 does not divide over mesh.tensor=8"),
        (
            {},
            over(tensor=8),
            "the nearest mesh.tensor that divides everything sharded over it is 4",
        ),
        (
            {"hidden_dim": 42},
            over(2, 1, 4),
            "feed-forward width (model.hidden_dim) of 42 does not divide over",
        ),
        ({"hidden_dim": 42}, over(2, 1, 4), "mesh.tensor=4; the nearest"),
        ({"hidden_dim": 42}, over(2, 1, 4), "sharded over it is 2"),
        (
            {"vocab_size": 53},
            over(tensor=2),
            "model.vocab_size=53 does not divide over mesh.tensor=2",
        ),
        ({"vocab_size": 53}, over(tensor=2), "is 1"),
        ({}, over(fsdp=32), "model.dim=48 does not divide over mesh.fsdp=32; the nearest"),
        ({}, over(fsdp=32), "is 16"),
        ({"sequence": True}, over(tensor=4), "data.sequence_length=10 (mesh.sequence) does not"),
        ({}, over(5), "data.batch_size=24 does not divide over 5 devices ×"),
        ({}, over(5), "accumulation_steps=1; the nearest that does is 25"),
        ({"accumulation": 4}, over(2, 4), "over 8 devices × optimizer.accumulation_steps=4;"),
        ({"accumulation": 4}, over(2, 4), "the nearest that does is 32"),
    ],
)
def test_error_has_what_does_not_divide_in_one_line(config, sizes, message):
    with pytest.raises(UsageError) as error:
        require_fitting(make_config(**config), sizes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
