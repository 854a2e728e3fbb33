"""Reports of plans, and what they are made of."""

import dataclasses

import pytest
from plans import changed, make_config

from llama_jax.hardware.accelerators import GIB
from llama_jax.planning.compile import Compiled
from llama_jax.planning.decoding import DecodingOptions, plan_decoding
from llama_jax.planning.report import (
    collective_lines,
    decoding_report,
    flags_of,
    format_seconds,
    search_report,
    training_report,
    verdict,
)
from llama_jax.planning.search import largest_microbatch, search
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import TrainingPlan, estimate, plan_training

TARGET = parse_target("v5e-8")
HLO = """
ENTRY %main (p: f32[4,8]) -> f32[32,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %g = f32[32,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}
"""


@pytest.fixture(scope="module")
def config():
    """A run whose three heads no tensor axis divides, so that a search has few meshes."""
    return make_config(model__num_heads=3, model__num_kv_heads=1, mesh__data=1, mesh__fsdp=8)


def target_of(usable):
    return dataclasses.replace(TARGET, chip=dataclasses.replace(TARGET.chip, usable=usable))


def compiled_plan(config, total, fits=True):
    made = Compiled(total, fits, HLO if fits else "")
    return TrainingPlan(estimate(config, TARGET), TARGET, made)


def test_a_report_has_kinds_margin_bottleneck_and_largest_microbatch():
    config = make_config(mesh__data=1, mesh__fsdp=8)
    text = training_report(plan_training(config, TARGET))
    lines = text.splitlines()
    assert lines[0] == "v5e-8: 8 × TPU v5e, slice 2x4"
    assert "16 sequences × 32 tokens, 1 microbatch of 2 per chip" in lines[1]
    assert "data 1 × fsdp 8 × tensor 1, remat none" in lines[1]
    assert "attention splash" in lines[2]
    for kind in ("parameters", "optimizer", "activations", "temporary", "total"):
        assert sum(line.startswith(kind) for line in lines) == 1
    assert any(
        line.startswith("fits: 15.74 GiB left (100%) of 15.75 GiB usable of 16") for line in lines
    )
    assert any(line.startswith("predicted") and "bound by" in line for line in lines)
    assert any(line.startswith("largest microbatch that fits, by estimate") for line in lines)


def test_compiled_and_estimated_figures_are_columns(config):
    plan = compiled_plan(config, 3 * GIB)
    assert sum(dataclasses.astuple(plan.memory)) == 3 * GIB
    text = training_report(plan)
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert total.split()[1] == "3.00" and len(total.split()) == 3
    assert "collectives, and GiB sent per chip: 1 all-gather" in text


def test_network_time_is_predicted_from_the_compiled_collectives(config):
    plan = compiled_plan(config, 3 * GIB)
    sent = 32 * 8 * 4 * 7 / 8
    assert plan.speed.network == pytest.approx(sent / (TARGET.chip.link / 2))
    assert plan.speed.arithmetic == plan.estimate.speed.arithmetic


def test_a_program_that_the_compiler_refused_does_not_fit_whatever_its_size(config):
    plan = compiled_plan(config, 15 * GIB, fits=False)
    assert not plan.fits and collective_lines(plan.compiled, 8) == []
    assert verdict(plan)[0].startswith("does not fit")
    assert plan.speed == plan.estimate.speed


def test_a_verdict_has_the_bytes_left_or_missing(config):
    (fits,) = verdict(compiled_plan(config, 10 * GIB))
    assert "fits: 5.75 GiB left (37%)" in fits
    (fits_not,) = verdict(compiled_plan(config, 20 * GIB))
    assert fits_not.startswith("does not fit: 4.25 GiB more than")
    on_gpus = plan_training(config, parse_target("H200-8"))
    assert "75% that JAX takes" in verdict(on_gpus)[0]


@pytest.mark.slow
def test_a_plan_that_does_not_fit_has_an_alternative_that_does(config):
    small = dataclasses.replace(TARGET.chip, usable=estimate(config, TARGET).memory.total * 0.9)
    target = dataclasses.replace(TARGET, chip=small)
    text = training_report(plan_training(config, target))
    assert "does not fit" in text and "cheapest that fits, by estimate" in text
    assert "--config." in text.splitlines()[-1]


@pytest.mark.slow
def test_where_nothing_fits_more_chips_are_advised(config):
    tiny = dataclasses.replace(TARGET, chip=dataclasses.replace(TARGET.chip, usable=1000.0))
    text = training_report(plan_training(config, tiny))
    assert "not one sequence per chip fits" in text
    assert "use more or larger chips" in text
    none = search_report(config, tiny, search(config, tiny))
    assert "fits this batch" in none and "use more or larger chips" in none


def test_flags_are_those_that_differ(config):
    new = changed(changed(config, "mesh", fsdp=4, tensor=2), "optimizer", moments_dtype="bfloat16")
    assert flags_of(new, config, TARGET) == (
        "--config.mesh.fsdp=4 --config.mesh.tensor=2 --config.optimizer.moments_dtype=bfloat16"
    )
    assert flags_of(config, config, TARGET) == "no change"


@pytest.mark.slow
def test_a_search_ranks_alternatives_with_their_flags(config):
    found = search(config, TARGET)
    lines = search_report(config, TARGET, found).splitlines()
    assert len(lines) == 2 + len(found) > 4
    assert all("estimated" in line for line in lines[2:])
    assert len({line.split("  ")[-1] for line in lines[2:]}) == len(found)


def test_what_the_compiler_refuses_is_left_out_and_only_the_best_are_compiled(config):
    compiled = []

    def compiler(alternative, target):
        compiled.append(alternative)
        return Compiled(2 * GIB, len(compiled) > 1, HLO)

    estimates = [one.estimate for one in search(config, TARGET)]
    found = search(config, TARGET, compiler)
    assert [one.estimate for one in found][:-1] == estimates[1:]
    assert [one.compiled is not None for one in found[:4]] == [True, True, True, False]
    assert len(compiled) == 4 and "2.00 compiled" in search_report(config, TARGET, found)


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 µs"), (0, "0 µs")]
)
def test_durations_have_units(seconds, text):
    assert format_seconds(seconds) == text


def test_a_report_of_decoding():
    model = make_config().model
    options = DecodingOptions(batch=4, quantize="int8", cache_dtype="int8")
    text = decoding_report(plan_decoding(model, options, TARGET))
    assert "4 sequences × 40 tokens; weights int8 over tensor 8 (replicated: 12 heads" in text
    assert "4 kv heads), cache int8" in text
    assert "fits" in text and "tokens/s in all" in text


def test_the_largest_microbatch_agrees_with_the_compiler(config):
    guess = estimate(config, TARGET).memory.total
    for usable, total, fits in ((1.2, 1.3, False), (1.2, 1.1, False), (1.2, 1.1, True)):
        target = target_of(usable * guess)
        made = Compiled(total * guess, fits, HLO)
        plan = plan_training(config, target, lambda way, target, made=made: made)
        largest = largest_microbatch(config, target, plan.correction)
        assert plan.fits == fits == (largest >= config.microbatch_size)
        assert f"by estimate × {plan.correction:.2f}" in training_report(plan)


def test_an_estimate_that_only_just_fits_has_a_warning(config):
    guess = estimate(config, TARGET).memory.total
    doubted = {
        (usable, made): "less than the estimate's error"
        in training_report(TrainingPlan(estimate(config, TARGET), target_of(usable * guess), made))
        for usable in (1.1, 1.2)
        for made in (None, Compiled(guess, True, HLO))
    }
    assert [key for key, is_doubted in doubted.items() if is_doubted] == [(1.1, None)]


def test_transfers_of_offload_are_reported_as_not_counted(config):
    for remat in ("block", "offload"):
        plan = plan_training(changed(config, "run", remat=remat), TARGET)
        assert ("the host are not counted" in training_report(plan)) == (remat == "offload")


def test_a_search_ranks_by_the_collectives_of_compiled_programs(config):
    large = HLO.replace("f32[32,8]", "f32[32000,8000]")
    texts = iter([large, HLO, HLO])
    found = search(config, TARGET, lambda way, target: Compiled(GIB, True, next(texts)))
    sent = 4 * 32000 * 8000 * 7 / 8
    assert found[-1].speed.network == pytest.approx(sent / (TARGET.chip.link / 2))
    assert found[
        -1
    ].compiled and f"{format_seconds(found[-1].speed.seconds)} (network)" in search_report(
        config, TARGET, found
    )


def test_the_columns_of_a_search_never_touch(config):
    found = search(config, TARGET)
    lines = search_report(config, TARGET, found).splitlines()[1:]
    assert {len(line.split("  ", 1)[0]) > 0 for line in lines} == {True}
    starts = {line.index("--config" if "--config" in line else "no change") for line in lines[1:]}
    assert starts == {lines[0].index("flags")}
    assert all(line[start - 2 : start] == "  " for line in lines for start in starts)


def test_a_search_that_finds_nothing_names_what_fits_whatever_the_mesh(config):
    config = changed(config, "mesh", data=3, fsdp=5)  # not a mesh of 8 devices
    lines = search_report(config, TARGET, []).splitlines()
    assert "cheapest that fits, by estimate" in lines[-2]
    assert "--config.mesh.data=1 --config.mesh.fsdp=8" in lines[-1]
