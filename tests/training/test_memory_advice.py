"""What to turn when a run does not fit: three knobs, none of them turned already."""

from types import SimpleNamespace

import pytest
from tiny_run import make_config

from llama_jax.training.memory_advice import memory_advice


def mesh(data=1, fsdp=1, tensor=1, kind="cpu"):
    size = data * fsdp * tensor
    devices = SimpleNamespace(size=size, flat=[SimpleNamespace(device_kind=kind)])
    return SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor}, devices=devices)


def advice(mesh, **changes):
    return memory_advice(make_config("tokens", "ckpt", **changes), mesh)


PLAN = "; python plan.py --config FILE tells beforehand what fits"


def test_what_keeps_the_results_comes_first():
    assert advice(mesh(data=2)) == (
        "try --config.optimizer.accumulation_steps=2, --config.run.remat=block or"
        " --config.mesh.fsdp=-1 --config.mesh.data=1" + PLAN
    )


@pytest.mark.parametrize(
    ("changes", "parts", "expected"),
    [
        ({}, 1, 2),  # of a batch of 8
        ({"optimizer__accumulation_steps": 2}, 1, 4),
        ({"optimizer__accumulation_steps": 4}, 2, 0),  # one sequence a device
        ({"data__batch_size": 15, "optimizer__accumulation_steps": 3}, 1, 5),
        ({"data__batch_size": 30}, 2, 3),
    ],
)
def test_microbatches_are_the_next_number_that_divides(changes, parts, expected):
    said = advice(mesh(fsdp=parts), **changes)
    assert ("accumulation_steps=" in said) == bool(expected)
    assert f"accumulation_steps={expected}," in said or not expected


def test_a_knob_that_is_turned_already_is_not_named():
    tight = {"run__remat": "block", "data__batch_size": 2, "optimizer__accumulation_steps": 1}
    assert advice(mesh(fsdp=2), **tight) == (
        "try --config.data.sequence_length=8, --config.optimizer.moments_dtype=bfloat16 or a"
        " smaller model" + PLAN
    )
    assert advice(mesh(fsdp=2), **tight, optimizer__moments_dtype="bfloat16") == (
        "try --config.data.sequence_length=8, a smaller model or more than 2 devices" + PLAN
    )


def test_the_plan_is_of_the_chips_that_are_here():
    assert " --target v5e-8 tells" in advice(mesh(fsdp=8, kind="TPU v5 lite"))
    assert " --target H200-1 tells" in advice(mesh(kind="NVIDIA H200"))
