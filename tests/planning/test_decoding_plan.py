"""What sampling takes."""

import pytest
from plans import make_config

from llama_jax.errors import UsageError
from llama_jax.planning.decoding_plan import Sampling, plan_decoding
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
