"""A plan as text."""

import dataclasses

import pytest
from plans import changed, make_config

from llama_jax.planning import report as searching
from llama_jax.planning import training as training_plan
from llama_jax.planning.compile import Compiled
from llama_jax.planning.decoding import Sampling, plan_decoding
from llama_jax.planning.report import (
    GIB,
    decoding_report,
    exchange_lines,
    flags_of,
    search,
    search_report,
    spelled,
    training_report,
    verdict,
)
from llama_jax.planning.search import estimate
from llama_jax.planning.targets import parse_target
from llama_jax.planning.training import TrainingPlan, plan_training

TARGET = parse_target("v5e-8")
HLO = """
ENTRY %main (p: f32[4,8]) -> f32[32,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %g = f32[32,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}
"""


@pytest.fixture(scope="module")
def config():
    return make_config(mesh__data=1, mesh__fsdp=8)


def target_of(usable):
    return dataclasses.replace(TARGET, chip=dataclasses.replace(TARGET.chip, usable=usable))


def compiled_plan(config, total, fits=True):
    made = Compiled(total, fits, HLO if fits else "", 1.0)
    return TrainingPlan(config, TARGET, estimate(config, TARGET), made, 8, None)


def test_an_estimate_tells_kinds_margin_bottleneck_and_largest_batch(config):
    text = training_report(plan_training(config, TARGET, compile_it=False))
    lines = text.splitlines()
    assert lines[0] == "v5e-8: 8 × TPU v5e, slice 2x4"
    assert "16 sequences × 32 tokens, 1 microbatch of 2 a chip" in lines[1]
    assert "data 1 × fsdp 8 × tensor 1, remat none" in lines[1]
    assert "attention splash" in lines[2]
    for kind in ("parameters", "optimizer", "activations", "temporary", "together"):
        assert sum(line.startswith(kind) for line in lines) == 1
    assert any(
        line.startswith("fits: 15.74 GiB left (100%) of 15.75 GiB usable of 16") for line in lines
    )
    assert any(line.startswith("predicted") and "bound by" in line for line in lines)
    assert any(line.startswith("largest microbatch that fits, by estimate") for line in lines)


def test_compiled_figures_stand_beside_the_estimate(config):
    plan = compiled_plan(config, 3 * GIB)
    assert sum(dataclasses.astuple(plan.memory)) == 3 * GIB
    text = training_report(plan)
    together = next(line for line in text.splitlines() if line.startswith("together"))
    assert together.split()[1] == "3.00" and len(together.split()) == 3
    assert "collectives, and what a chip sends: 1 all-gather" in text


def test_the_network_is_predicted_from_the_compiled_exchanges(config):
    plan = compiled_plan(config, 3 * GIB)
    sent = 32 * 8 * 4 * 7 / 8
    assert plan.speed.network == pytest.approx(sent / (TARGET.chip.link / 2))
    assert plan.speed.arithmetic == plan.estimate.speed.arithmetic


def test_a_program_the_compiler_refused_does_not_fit_whatever_its_size(config):
    plan = compiled_plan(config, 15 * GIB, fits=False)
    assert not plan.fits and exchange_lines(plan.compiled, 8) == []
    assert plan.speed == plan.estimate.speed


def test_a_verdict_names_margin_or_lack():
    assert "fits: 5.75 GiB left" in verdict(10 * GIB, TARGET, True)
    assert "(37%)" in verdict(10 * GIB, TARGET, True)
    assert "75% that JAX takes" in verdict(GIB, parse_target("H200-1"), True)
    assert verdict(20 * GIB, TARGET, False).startswith("does not fit: 4.25 GiB more than")


def test_what_does_not_fit_comes_with_a_way_that_does(config):
    small = dataclasses.replace(TARGET.chip, usable=estimate(config, TARGET).memory.total * 0.9)
    target = dataclasses.replace(TARGET, chip=small)
    text = training_report(plan_training(config, target, compile_it=False))
    assert "does not fit" in text and "cheapest that fits, by estimate" in text
    assert "--config." in text.splitlines()[-1]


def test_where_nothing_fits_it_says_so(config):
    tiny = dataclasses.replace(TARGET, chip=dataclasses.replace(TARGET.chip, usable=1000.0))
    text = training_report(plan_training(config, tiny, compile_it=False))
    assert "this way not one sequence a chip fits" in text
    assert "use more or larger chips" in text
    none = search_report(config, tiny, search(config, tiny, compile_it=False))
    assert "fits this batch" in none and "use more or larger chips" in none


def test_flags_are_those_that_differ(config):
    new = changed(changed(config, "mesh", fsdp=4, tensor=2), "optimizer", moments_dtype="bfloat16")
    assert flags_of(new, config, TARGET) == (
        "--config.mesh.fsdp=4 --config.mesh.tensor=2 --config.optimizer.moments_dtype=bfloat16"
    )
    assert flags_of(config, config, TARGET) == "as it is"


def test_a_search_ranks_ways_with_their_flags(config):
    found = search(config, TARGET, compile_it=False)
    lines = search_report(config, TARGET, found).splitlines()
    assert len(lines) == 2 + len(found) > 4
    assert all("estimated" in line for line in lines[2:])
    assert len({line.split("  ")[-1] for line in lines[2:]}) == len(found)


def test_what_the_compiler_refuses_is_left_out_and_only_the_best_are_asked_about(
    config, monkeypatch
):
    asked = []

    def compile_training(way, target):
        asked.append(way)
        return Compiled(2 * GIB, len(asked) > 1, HLO, 1.0)

    ways = [one.way for one in search(config, TARGET, compile_it=False)]
    monkeypatch.setattr(searching, "compile_training", compile_training)
    found = search(config, TARGET, compile_it=True)
    assert [one.way for one in found][:-1] == ways[1:]
    assert [one.compiled is not None for one in found[:4]] == [True, True, True, False]
    assert len(asked) == 4 and "2.00 compiled" in search_report(config, TARGET, found)


@pytest.mark.parametrize(
    ("seconds", "text"), [(123.4, "123 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 µs"), (0, "0 µs")]
)
def test_times_are_told_with_their_unit(seconds, text):
    assert spelled(seconds) == text


def test_sampling_is_told_by_kind():
    model = make_config().model
    sampling = Sampling(batch=4, quantize="int8", cache_dtype="int8")
    text = decoding_report(plan_decoding(model, sampling, TARGET, compile_it=False))
    assert "4 texts × 40 tokens; weights int8 over tensor 8 (whole on each: 12 heads" in text
    assert "4 kv heads), cache int8" in text
    assert "fits" in text and "tokens/s in all at most" in text


def test_the_largest_microbatch_agrees_with_the_compiler_s_verdict(config, monkeypatch):
    guess = estimate(config, TARGET).memory.total
    for usable, total, fits in ((1.2, 1.3, False), (1.2, 1.1, False), (1.2, 1.1, True)):
        target = target_of(usable * guess)
        made = Compiled(total * guess, fits, HLO, 1.0)
        monkeypatch.setattr(training_plan, "compile_training", lambda way, target, made=made: made)
        plan = plan_training(config, target, compile_it=True)
        assert plan.fits == fits == (plan.largest_microbatch >= config.microbatch_size)
        assert f"by estimate × {plan.correction:.2f}" in training_report(plan)


def test_an_estimate_that_only_just_fits_is_doubted(config):
    guess = estimate(config, TARGET).memory.total
    doubted = {
        (usable, made): "less than the estimate's own error"
        in training_report(
            TrainingPlan(config, target_of(usable * guess), estimate(config, TARGET), made, 8, None)
        )
        for usable in (1.1, 1.2)
        for made in (None, Compiled(guess, True, HLO, 1.0))
    }
    assert [key for key, is_doubted in doubted.items() if is_doubted] == [(1.1, None)]


def test_what_offload_exchanges_with_the_host_is_said_not_to_be_counted(config):
    for remat in ("block", "offload"):
        plan = plan_training(changed(config, "run", remat=remat), TARGET, compile_it=False)
        assert ("the host is not counted" in training_report(plan)) == (remat == "offload")


def test_a_search_predicts_and_ranks_by_what_the_compiled_programs_exchange(config, monkeypatch):
    large = HLO.replace("f32[32,8]", "f32[32000,8000]")
    texts = iter([large, HLO, HLO])
    monkeypatch.setattr(
        searching, "compile_training", lambda way, target: Compiled(GIB, True, next(texts), 1.0)
    )
    found = search(config, TARGET, compile_it=True)
    sent = 4 * 32000 * 8000 * 7 / 8
    assert found[-1].speed.network == pytest.approx(sent / (TARGET.chip.link / 2))
    assert found[-1].compiled and f"{spelled(found[-1].speed.seconds)} (network)" in search_report(
        config, TARGET, found
    )


def test_the_columns_of_a_search_never_touch(config):
    found = search(config, TARGET, compile_it=False)
    lines = search_report(config, TARGET, found).splitlines()[1:]
    assert {len(line.split("  ", 1)[0]) > 0 for line in lines} == {True}
    starts = {line.index("--config" if "--config" in line else "as it is") for line in lines[1:]}
    assert starts == {lines[0].index("flags")}
    assert all(line[start - 2 : start] == "  " for line in lines for start in starts)


def test_a_search_that_finds_nothing_names_what_else_fits_whatever_mesh_is_asked_for(
    config, monkeypatch
):
    other = estimate(changed(config, "optimizer", moments_dtype="bfloat16"), TARGET)
    monkeypatch.setattr(searching, "cheapest_that_fits", lambda config, target: other)
    asked = changed(config, "mesh", data=3, fsdp=5)  # which does not arrange 8 devices
    text = search_report(asked, TARGET, [])
    assert "cheapest that fits, by estimate" in text
    flags = "--config.mesh.data=1 --config.mesh.fsdp=8 --config.optimizer.moments_dtype=bfloat16"
    assert text.endswith(flags)
