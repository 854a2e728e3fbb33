"""What sampling takes."""

import dataclasses

import pytest
from plans import make_config

from llama_jax.errors import UsageError
from llama_jax.planning.compile import Compiled
from llama_jax.planning.decoding import Sampling, plan_decoding
from llama_jax.planning.report import cheapest_sampling, decoding_report, largest_batch
from llama_jax.planning.targets import parse_target

MODEL = make_config(model__context_length=64).model  # 64 slots hold it exactly
L, K, H, V, D, F = 3, 4, 4, 96, 48, 80
MATRICES = 2 * V * D + L * (2 * D * D + 2 * D * K * H + 3 * D * F)
NORMS = (2 * L + 1) * D


def plan_of(target="H200-1", **sampling):
    return plan_decoding(MODEL, Sampling(**sampling), parse_target(target), compile_it=False)


def test_weights_and_cache_by_hand():
    plan = plan_of(batch=5)
    assert plan.weights == 4 * (MATRICES + NORMS)
    assert plan.cache == pytest.approx(2 * L * 5 * K * 64 * H * 4, abs=64)  # and a length a row


def test_a_dtype_of_half_the_width_halves_both():
    wide, narrow = plan_of(batch=5), plan_of(batch=5, dtype="bfloat16")
    assert narrow.weights == wide.weights / 2
    assert narrow.cache == pytest.approx(wide.cache / 2, abs=64)


def test_int8_weights_have_a_scale_for_each_output():
    outputs = 2 * V + L * (2 * D + 2 * K * H + 2 * F + D)
    assert plan_of(quantize="int8").weights == MATRICES + 4 * outputs + 4 * NORMS


def test_four_bits_take_less_than_eight():
    assert plan_of(quantize="int4").weights < plan_of(quantize="int8").weights


def test_a_cache_of_int8_has_a_scale_for_each_head_and_token():
    plan = plan_of(batch=5, cache_dtype="int8")
    assert plan.cache == pytest.approx(2 * L * 5 * K * 64 * (H + 4), abs=64)


def test_devices_share_weights_and_cache():
    one, four = plan_of(batch=2), plan_of("H200-4", batch=2)
    assert four.weights == 4 * (MATRICES / 4 + NORMS)
    assert four.cache == pytest.approx(one.cache / 4, abs=64)


def test_a_shorter_context_needs_a_smaller_cache():
    assert plan_of(context=33).cache == plan_of().cache  # both in 64 slots
    assert plan_of(context=33).model.context_length == 33


def test_tpus_fill_narrow_heads_up_to_their_lanes():
    tpu, gpu = plan_of("v5e-1"), plan_of()
    assert tpu.temporary - gpu.temporary == pytest.approx(tpu.cache * 128 / H)


def test_reading_the_weights_bounds_one_text():
    plan = plan_of()
    assert plan.speed.bottleneck == "memory"
    assert plan.speed.memory == (plan.weights + plan.cache) / plan.target.chip.bandwidth
    assert plan.fits and plan.total == plan.estimated


@pytest.mark.parametrize(
    ("sampling", "complaint"),
    [
        ({"context": 65}, "context=65 is out of range; expected 2 to 64"),
        ({"context": 1}, "context=1 is out of range"),
        ({"batch": 0}, "batch=0 is out of range"),
        ({"quantize": "int3"}, "quantize='int3' is unknown"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' is unknown"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(sampling, complaint):
    with pytest.raises(UsageError) as error:
        plan_of(**sampling)
    assert complaint in str(error.value)


def small_target(usable, name="H200-1"):
    target = parse_target(name)
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, usable=usable))


def test_what_does_not_fit_names_fewer_texts_and_the_least_change_that_keeps_all():
    guess = plan_of(batch=64).estimated
    target = small_target(0.9 * guess)
    plan = plan_decoding(MODEL, Sampling(batch=64), target, compile_it=False)
    assert not plan.fits and 50 <= largest_batch(plan) < 64
    more = plan_decoding(MODEL, Sampling(batch=largest_batch(plan)), target, compile_it=False)
    assert more.fits
    found = cheapest_sampling(plan)
    assert found.sampling.batch == 64 and found.estimated <= 0.85 * target.chip.usable
    assert found.sampling == Sampling(batch=64, cache_dtype="int8")  # weights alone would not do
    text = decoding_report(plan)
    assert f"largest batch that fits, by estimate: {largest_batch(plan)} texts" in text
    assert "cheapest change that fits, by estimate: --cache_dtype=int8" in text


def test_where_no_change_is_enough_more_chips_are_named():
    plan = plan_decoding(MODEL, Sampling(), small_target(1000.0), compile_it=False)
    text = decoding_report(plan)
    assert "not one text fits" in text and "use more or larger chips" in text


def test_compiled_figures_stand_beside_the_estimate():
    plan = dataclasses.replace(plan_of(), compiled=Compiled(2.0**31, True, "", 1.0))
    lines = {
        line.split()[0]: line.split()[1:] for line in decoding_report(plan).splitlines() if line
    }
    assert lines["together"][0] == "2.00" and len(lines["temporary"]) == 2
    assert lines["GiB"] == ["a", "chip", "compiled", "estimated"]


def test_what_the_chips_do_not_divide_is_named_and_predicted_whole():
    eight, one = plan_of("H200-8"), plan_of()
    assert eight.uncut == ["12 heads", "4 kv heads"]
    assert "over tensor 8 (whole on each: 12 heads, 4 kv heads)" in decoding_report(eight)
    attention = L * (D * 2 * (12 + K) * H + 2 * 12 * H * 64)
    cut = V * D + L * 3 * D * F
    ratio = eight.speed.arithmetic / one.speed.arithmetic
    assert ratio == pytest.approx((attention + cut / 8) / (attention + cut))
    assert eight.speed.network == L * 2 * 7 / 8 * D * 4 / (eight.target.chip.link / 2)
