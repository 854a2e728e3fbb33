"""The memory and speed of decoding."""

import dataclasses

import jax
import pytest
from cases import slow
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from plans import make_config

from llama_jax.errors import UsageError
from llama_jax.planning.compile import Compiled
from llama_jax.planning.decoding import DecodingOptions, plan_decoding, trace_decoding
from llama_jax.planning.report import decoding_report
from llama_jax.planning.search import cheapest_decoding_change, largest_decoding_batch
from llama_jax.planning.targets import parse_target

MODEL = make_config(model__context_length=64).model  # 64 slots hold it exactly
L, K, H, V, D, F = 3, 4, 4, 96, 48, 80
MATRICES = 2 * V * D + L * (2 * D * D + 2 * D * K * H + 3 * D * F)
NORMS = (2 * L + 1) * D


def plan_of(target="H200-1", **options):
    return plan_decoding(MODEL, DecodingOptions(**options), parse_target(target))


def test_bytes_of_weights_and_cache():
    plan = plan_of(batch=5)
    assert plan.weights == 4 * (MATRICES + NORMS)
    assert plan.cache == pytest.approx(2 * L * 5 * K * 64 * H * 4, abs=64)  # and a length a row


def test_bfloat16_halves_weights_and_cache():
    wide, narrow = plan_of(batch=5), plan_of(batch=5, dtype="bfloat16")
    assert narrow.weights == wide.weights / 2
    assert narrow.cache == pytest.approx(wide.cache / 2, abs=64)


def test_int8_weights_have_a_scale_for_each_output():
    outputs = 2 * V + L * (2 * D + 2 * K * H + 2 * F + D)
    assert plan_of(quantize="int8").weights == MATRICES + 4 * outputs + 4 * NORMS


def test_four_bits_take_less_than_eight():
    assert plan_of(quantize="int4").weights < plan_of(quantize="int8").weights


def test_an_int8_cache_has_a_scale_for_each_head_and_token():
    plan = plan_of(batch=5, cache_dtype="int8")
    assert plan.cache == pytest.approx(2 * L * 5 * K * 64 * (H + 4), abs=64)


def test_devices_share_weights_and_cache():
    one, four = plan_of(batch=2), plan_of("H200-4", batch=2)
    assert four.weights == 4 * (MATRICES / 4 + NORMS)
    assert four.cache == pytest.approx(one.cache / 4, abs=64)


def test_a_shorter_context_needs_a_smaller_cache():
    assert plan_of(context=33).cache == plan_of().cache  # both in 64 slots
    assert plan_of(context=33).model.context_length == 33


def test_a_table_of_positions_stays_whole_in_a_shorter_context():
    config = dataclasses.replace(MODEL, position="absolute")
    for context in (0, 33):
        options = DecodingOptions(context=context)
        plan = plan_decoding(config, options, parse_target("H200-1"))
        assert plan.weights == 4 * (MATRICES + NORMS + config.context_length * D)


def on_tpu(target="v5e-1", **options):
    """The bytes that only a TPU needs beside weights and cache."""
    return plan_of(target, **options).temporary - plan_of(**options).temporary


def test_tpus_copy_narrow_heads_and_a_narrow_embedding_padded_to_their_tiles():
    table = V * 128  # numbers; there are D columns
    assert on_tpu() == pytest.approx(table * 4)  # the cache of one sequence is read where it is
    assert on_tpu(quantize="int8") == pytest.approx(table)
    five = {"batch": 5, "dtype": "bfloat16"}
    padded = plan_of(**five).cache * (24 * 128) / (5 * K * H)  # 20 rows, in tiles of 8
    assert on_tpu(**five) == pytest.approx(padded + table * 2)


@pytest.mark.parametrize(("batch", "arrays", "width"), [(1, 4, 4), (3, 6, 4), (8, 4, 2)])
@pytest.mark.parametrize(("target", "devices"), [("v5e-1", 1), ("v5e-4", 4)])
def test_tpus_broadcast_the_scales_of_nf4_matrices(target, devices, batch, arrays, width):
    options = {"batch": batch, "dtype": "bfloat16", "target": target}
    nf4, int8 = (on_tpu(**options, quantize=kind) for kind in ("nf4", "int8"))
    largest = V * 64 / 2 / devices  # bytes of a shard of a table, its inputs padded to 64
    assert nf4 - int8 == arrays * largest * width


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("target", "devices"), [("v5e-1", 1), ("v5e-4", 4)])
def test_tpus_pad_the_scales_of_an_int4_matrix_to_their_lanes(target, devices, batch):
    options = {"batch": batch, "dtype": "bfloat16", "target": target}
    int4, int8 = (on_tpu(**options, quantize=kind) for kind in ("int4", "int8"))
    # Bytes: they and the minima bfloat16, the sum float32. The table itself is copied in both.
    assert int4 - int8 == (2 * 2 + 2 + 4) * V / devices * 128


def test_heads_that_devices_share_are_in_the_cache_of_each():
    config, options = dataclasses.replace(MODEL, num_heads=16, head_dim=H), DecodingOptions()
    targets = map(parse_target, ("H200-4", "H200-8"))
    four, eight = (plan_decoding(config, options, target) for target in targets)
    assert eight.cache == four.cache  # of one of four kv heads


def test_memory_bandwidth_bounds_one_sequence():
    plan = plan_of()
    assert plan.speed.bottleneck == "memory"
    assert plan.speed.memory == (plan.weights + plan.cache) / plan.target.chip.bandwidth
    assert plan.fits and plan.total == plan.estimated


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context": 65}, "context=65 is out of range; expected 2 to 64, the model"),
        ({"context": 1}, "context=1 is out of range"),
        ({"batch": 0}, "batch=0 is out of range"),
        ({"quantize": "int3"}, "quantize='int3' is unknown"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' is unknown"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
    ],
)
def test_invalid_options_are_refused(options, complaint):
    with pytest.raises(UsageError) as error:
        plan_of(**options)
    assert complaint in str(error.value)


def small_target(usable, name="H200-1"):
    target = parse_target(name)
    return dataclasses.replace(target, chip=dataclasses.replace(target.chip, usable=usable))


def test_a_plan_that_does_not_fit_names_a_smaller_batch_and_the_smallest_change_that_keeps_it():
    guess = plan_of(batch=64).estimated
    target = small_target(0.9 * guess)
    plan = plan_decoding(MODEL, DecodingOptions(batch=64), target)
    assert not plan.fits and 50 <= largest_decoding_batch(plan) < 64
    more = plan_decoding(MODEL, DecodingOptions(batch=largest_decoding_batch(plan)), target)
    assert more.fits
    found = cheapest_decoding_change(plan)
    assert found.options.batch == 64 and found.estimated <= 0.85 * target.chip.usable
    assert found.options == DecodingOptions(
        batch=64, cache_dtype="int8"
    )  # weights alone would not do
    text = decoding_report(plan)
    assert f"largest batch that fits, by estimate: {largest_decoding_batch(plan)} sequences" in text
    assert "cheapest change that fits, by estimate: --cache_dtype=int8" in text


def test_where_no_change_is_enough_more_chips_are_advised():
    plan = plan_decoding(MODEL, DecodingOptions(), small_target(1000.0))
    text = decoding_report(plan)
    assert "not one sequence fits" in text and "use more or larger chips" in text


def test_the_report_of_decoding_has_compiled_and_estimated_columns():
    plan = dataclasses.replace(plan_of(), compiled=Compiled(2.0**31, True, ""))
    lines = {
        line.split()[0]: line.split()[1:] for line in decoding_report(plan).splitlines() if line
    }
    assert lines["total"][0] == "2.00" and len(lines["temporary"]) == 2
    assert lines["GiB"] == ["per", "chip", "compiled", "estimated"]


def test_sizes_that_the_devices_do_not_divide_are_named_and_predicted_as_replicated():
    eight, one = plan_of("H200-8"), plan_of()
    assert eight.replicated == ["12 heads", "4 kv heads"]
    assert "over tensor 8 (replicated: 12 heads, 4 kv heads)" in decoding_report(eight)
    attention = L * (D * 2 * (12 + K) * H + 2 * 12 * H * 64)
    cut = V * D + L * 3 * D * F
    ratio = eight.speed.arithmetic / one.speed.arithmetic
    assert ratio == pytest.approx((attention + cut / 8) / (attention + cut))
    assert eight.speed.network == L * 2 * 7 / 8 * D * 4 / (eight.target.chip.link / 2)


def matmul_primitives(platform, devices, options):
    """The primitives in the matmuls of a decode loop that is traced for a platform."""
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    mesh = AbstractMesh(
        (1, 1, devices),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        abstract_device=device,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        program = trace_decoding(MODEL, DecodingOptions(**options), mesh).jaxpr
    return primitives_of(program.jaxpr, ("times_transposed", "times_quantized"), inside=False)


def primitives_of(jaxpr, functions, inside):
    found = set()
    for equation in jaxpr.eqns:
        within = inside or equation.params.get("name") in functions
        found |= {equation.primitive.name} if inside else set()
        for inner in jaxprs_in_params(equation.params):
            found |= primitives_of(inner, functions, within)
    return found


@pytest.mark.parametrize(
    ("options", "on_cpu"),  # primitives that only the implementations for CPU have
    [
        slow(({"dtype": "float32"}, {"transpose", "optimization_barrier"})),
        slow(({"dtype": "float32", "batch": 8}, {"transpose", "optimization_barrier"})),
        slow(({"dtype": "float32", "quantize": "int8"}, {"transpose"})),
        ({"dtype": "float32", "quantize": "int8", "batch": 8}, {"scan"}),
        ({"dtype": "bfloat16", "quantize": "int4"}, {"transpose"}),
        slow(({"dtype": "bfloat16", "quantize": "int4", "batch": 8}, {"scan"})),
    ],
)
def test_a_decode_loop_for_a_tpu_has_none_of_the_matmuls_for_cpu(options, on_cpu):
    assert on_cpu <= matmul_primitives("cpu", 1, options)
    for devices in (1, 4):
        found = matmul_primitives("tpu", devices, options)
        assert "dot_general" in found and not on_cpu & found
