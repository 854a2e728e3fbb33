"""Alternatives to a plan."""

import dataclasses

import pytest
from plans import changed, make_config

from llama_jax.planning.search import (
    MARGIN,
    cheapest_that_fits,
    largest_microbatch,
    meshes,
    ranked,
)
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import estimate


def target_of(usable, name="v5e-8"):
    """Return a target whose chips have so many usable bytes."""
    target = parse_target(name)
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, usable=usable))


@pytest.fixture(scope="module")
def config():
    return make_config(mesh__data=1, mesh__fsdp=8, data__batch_size=64)


@pytest.fixture(scope="module")
def total(config):
    return estimate(config, parse_target("v5e-8")).memory.total


def test_meshes_divide_batch_and_model(config):
    found = list(meshes(config, 8))
    shapes = {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in found}
    # No fsdp or tensor of 8: 12 heads and a vocabulary of 96 take 4, a width of 48 takes all.
    assert shapes == {
        (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 1, 4),
        (1, 2, 4),
    }  # fmt: skip
    assert {mesh.tensor for mesh in found if mesh.sequence} == {2, 4}


def test_the_largest_microbatch_fits_and_one_sequence_more_per_device_does_not(config, total):
    target = target_of(total)
    most = largest_microbatch(config, target)
    assert most % 8 == 0 and most >= 64
    fits, not_fits = (
        estimate(changed(config, "data", batch_size=size), target).memory.total
        for size in (most, most + 8)
    )
    assert fits <= target.chip.usable < not_fits


def test_no_limit_but_memory_bounds_the_largest_microbatch(config):
    assert largest_microbatch(config, target_of(2.0**45)) > 8 * 2**16


def test_the_largest_microbatch_is_0_where_not_one_sequence_per_device_fits(config):
    assert largest_microbatch(config, target_of(1000)) == 0


def test_every_alternative_fits_with_a_margin_and_keeps_the_batch(config, total):
    target = target_of(1.02 * total)
    ways = ranked(config, target)
    assert ways and config not in [way.config for way in ways]  # it fits, but only just
    for way in ways:
        assert way.memory.total <= (1 - MARGIN) * target.chip.usable
        assert way.config.data == config.data and way.config.model == config.model
        assert way.memory == estimate(way.config, target).memory


def test_alternatives_are_ranked_by_predicted_speed(config, total):
    seconds = [float(f"{way.speed.seconds:.3g}") for way in ranked(config, target_of(2 * total))]
    assert seconds == sorted(seconds) and len(set(seconds)) > 2


def test_precision_and_batch_change_only_where_other_meshes_are_not_enough(config, total):
    state = sum(dataclasses.astuple(estimate(config, parse_target("v5e-8")).memory)[:2])
    learnt = []
    for usable in (2 * total, 0.75 * state + 2 * state, 1.45 * state):
        way = cheapest_that_fits(config, target_of(usable))
        learnt.append(
            (way.config.optimizer.moments_dtype, way.config.data.batch_size) if way else None
        )
    assert learnt[0] == ("float32", 64)
    assert cheapest_that_fits(config, target_of(0.2 * state)) is None


def test_a_correction_acts_as_if_less_memory_were_usable(config, total):
    target, factor = target_of(1.5 * total), 1.25
    smaller = target_of(1.5 * total / factor)
    assert largest_microbatch(config, target, factor) == largest_microbatch(config, smaller)
    assert ranked(config, target, factor) == ranked(config, smaller) != ranked(config, target)
