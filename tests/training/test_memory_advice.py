"""What to turn when a run does not fit: three knobs, none of them turned already."""

from types import SimpleNamespace

import pytest
from tiny_run import make_config

from llama_jax.errors import UsageError
from llama_jax.hardware.accelerators import CHIPS, machine_name
from llama_jax.planning.targets import parse_target
from llama_jax.training.summary import memory_advice


def mesh(data=1, fsdp=1, tensor=1, kind="cpu"):
    size = data * fsdp * tensor
    devices = SimpleNamespace(size=size, flat=[SimpleNamespace(device_kind=kind)])
    return SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor}, devices=devices)


def advice(mesh, **changes):
    return memory_advice(make_config("tokens", "ckpt", **changes), mesh)


PLAN = "; python plan.py --config FILE computes what fits"


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


def test_a_sequence_is_never_made_shorter_than_the_config_allows():
    tight = {"run__remat": "block", "data__batch_size": 2, "optimizer__moments_dtype": "bfloat16"}
    assert "sequence_length=2," in advice(mesh(fsdp=2), **tight, data__sequence_length=4)
    assert advice(mesh(fsdp=2), **tight, data__sequence_length=3) == (
        "try a smaller model or more than 2 devices" + PLAN
    )


@pytest.mark.parametrize(
    ("kind", "count", "target"),
    [
        ("TPU v5 lite", 8, " --target v5e-8"),
        ("TPU v5p", 32, " --target v5p-64"),  # named by TensorCores
        ("TPU v4", 16, " --target v4-32"),
        ("TPU v3", 8, " --target v3-8"),  # a device is a core
        ("NVIDIA H200", 1, " --target H200-1"),
        ("NVIDIA H200", 3, ""),  # no machine that the planner knows
        ("TPU v5 lite", 3, ""),
        ("NVIDIA GeForce", 1, ""),
    ],
)
def test_the_plan_is_of_the_chips_that_are_here(kind, count, target):
    assert f" --config FILE{target} computes" in advice(mesh(fsdp=count, kind=kind))


def machine(target):
    """The chip and the devices that the planner takes for a name, or None."""
    try:
        parsed = parse_target(target)
    except UsageError:
        return None
    return parsed.chip, parsed.devices


@pytest.mark.parametrize("name", CHIPS)
def test_the_planner_understands_every_name_and_has_no_others(name):
    chip, most = CHIPS[name], 256
    targets = {count: machine_name(chip, count) for count in range(1, most + 1)}
    named = {count: target for count, target in targets.items() if target}
    assert {count: machine(target) for count, target in named.items()} == {
        count: (chip, count) for count in named
    }
    known = filter(None, (machine(f"{name}-{count}") for count in range(1, 2 * most + 1)))
    assert named.keys() == {devices for _, devices in known if devices <= most}
