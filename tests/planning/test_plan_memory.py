"""The estimated memory of a training step: its parts, and the laws that it obeys."""

import dataclasses

import jax
import pytest
from plans import changed, make_config

from llama_jax.config import MeshConfig
from llama_jax.hardware.accelerators import CHIPS
from llama_jax.planning.activations import DeviceStep, residual_bytes
from llama_jax.planning.memory import (
    GATHERED_STREAMS,
    MIN_GATHERED_STREAMS,
    abstract_mesh,
    state_bytes,
    training_memory,
)

V, D, L, N, K, F = 96, 48, 3, 12, 4, 80  # of `make_config`
NORMS = (2 * L + 1) * D
MATRICES = 2 * V * D + L * (2 * D * D + 2 * D * D * K // N + 3 * D * F)
TPU, GPU = CHIPS["v5e"], CHIPS["H200"]


def memory_of(config, chip=GPU):
    return training_memory(config, abstract_mesh(config.mesh, 8), chip)


def kept(batch=2, **changes):
    """Return the bytes of the residuals of one device; `remat="block"` changes the step."""
    step = {"model": make_config().model, "length": 32, "remat": "none", "attention": "splash"}
    return residual_bytes(DeviceStep(**step | {"batch": batch, "is_tpu": False} | changes))


def on_mesh(data, fsdp, tensor, **changes):
    return make_config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **changes)


def test_bytes_of_parameters_and_moments():
    memory = memory_of(on_mesh(8, 1, 1))
    assert memory.parameters == 4 * (MATRICES + NORMS)
    assert memory.optimizer == pytest.approx(2 * memory.parameters, abs=16)  # and step counts


def test_a_table_of_positions_is_sharded_as_the_embedding_is_over_fsdp():
    more = [
        memory_of(on_mesh(*shape, model__position="absolute")).parameters
        - memory_of(on_mesh(*shape)).parameters
        for shape in ((8, 1, 1), (1, 4, 2))
    ]
    assert more == [4 * 40 * D, 40 * D]


def test_moments_in_bfloat16_take_half():
    wide, narrow = (
        memory_of(on_mesh(8, 1, 1, optimizer__moments_dtype=dtype)).optimizer
        for dtype in ("float32", "bfloat16")
    )
    assert narrow == pytest.approx(wide / 2, abs=16)


def test_fsdp_and_tensor_shard_the_matrices_and_fsdp_the_norms():
    memory = memory_of(on_mesh(1, 4, 2))
    assert memory.parameters == 4 * (MATRICES / 8 + NORMS / 4)


def test_kv_heads_that_do_not_divide_are_replicated():
    config = on_mesh(1, 1, 8, model__num_heads=8)  # 4 kv heads of 6
    mesh = abstract_mesh(config.mesh, 8)
    copied = L * 2 * D * K * (D // 8)
    cut = 2 * V * D + L * (2 * D * D + 3 * D * F)
    parameters, *_ = state_bytes(config, mesh, is_tpu=False)
    assert parameters == 4 * (copied + cut / 8 + NORMS)


def test_block_keeps_the_residual_stream_before_each_block_and_the_gradients_of_the_loss():
    one, five = (kept(batch, remat="block", is_tpu=True) for batch in (1, 5))
    stream, per_sequence = 32 * D * 4, (five - one) / 4
    # L streams, and some at the end: the last one, its norm's, and the gradient from the loss.
    assert L * stream < per_sequence < (L + 8) * stream
    assert one - per_sequence >= V * D * 4  # the output matrix's gradient, whatever the batch


def test_further_sequences_add_what_tracing_them_would():
    assert kept(1) + kept(3) == 2 * kept(2)


@pytest.mark.parametrize(
    "chip", [TPU, pytest.param(GPU, marks=pytest.mark.slow)], ids=["tpu", "gpu"]
)
def test_policies_keep_less_the_more_they_recompute(chip):
    kept = {
        remat: memory_of(on_mesh(8, 1, 1, run__remat=remat), chip)
        for remat in ("none", "save-matmuls", "save-qkv", "block", "offload", "auto")
    }
    names = ("none", "save-matmuls", "save-qkv", "block")
    by_policy = [kept[name].activations for name in names]
    assert by_policy == sorted(by_policy, reverse=True) and len(set(by_policy)) == 4
    assert kept["auto"] == kept["save-matmuls"]
    assert kept["offload"] == kept["block"]  # the rest lies on the host


def test_more_chips_never_take_more_each():
    totals = []
    for devices in (1, 2, 8):
        config = make_config(mesh__data=1, mesh__fsdp=devices)
        totals.append(training_memory(config, abstract_mesh(config.mesh, devices), TPU).total)
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


def test_sharding_the_stream_along_the_sequence_keeps_less():
    whole, cut = (
        memory_of(on_mesh(2, 1, 4, run__remat="block", mesh__sequence=sequence)).activations
        for sequence in (False, True)
    )
    stream = 8 * 32 * D * 4  # float32, eight rows a device
    assert (L - 1) * stream * 3 / 4 < whole - cut < (L + 8) * stream * 3 / 4


def test_streams_sharded_along_the_sequence_are_gathered_within_a_block():
    config = on_mesh(1, 2, 4, run__remat="block", mesh__sequence=True, run__attention="splash")
    stream = 8 * 32 * D * 4  # float32, eight rows a device
    cut = memory_of(config, TPU)
    whole = memory_of(changed(config, "mesh", sequence=False), TPU)
    assert cut.temporary - whole.temporary == pytest.approx(GATHERED_STREAMS * stream)


@pytest.mark.parametrize("length", [32, D])  # D: two dims that no shape tells apart
def test_the_sharded_stream_is_kept_gathered_where_matmuls_read_it(length):
    model = make_config(model__compute_dtype="bfloat16", model__context_length=D).model
    step = {"model": model, "length": length}
    stream = length * D * 2  # bytes in bfloat16
    # Of a block, each norm keeps its input in float32, once as it is and once normed, and the
    # latter in bfloat16. Then the last norm's, and the gradient of the loss.
    streams = L * 2 * (2 + 2 + 1) + (2 + 2 + 1) + 1
    scalars = (L * 2 + 1) * 2 * length * 4  # the norms' statistics
    for batch in (1, 2, 5):
        saved = kept(batch, **step) - kept(batch, **step, sequence_shards=4)
        assert saved == batch * (streams * stream + scalars) * 3 / 4


def test_a_tpu_keeps_in_bfloat16_what_only_matmuls_read():
    step = {"attention": "xla", "is_tpu": True}
    float32 = 2 * 32 * 4  # bytes of one number for each token
    inputs = 2 * D + (D + 2 * D * K // N) + N * 32 + D + F  # norms', q, k, v, weights, wo's, down's
    halved = kept(**step | {"is_tpu": False}) - kept(**step)
    assert halved == L * inputs * float32 / 2
    # `jax.checkpoint`, where parameters are sharded, keeps them as they are.
    assert kept(**step | {"is_tpu": False}, fsdp=2) == kept(**step, fsdp=2)


def test_short_of_memory_fewer_streams_are_gathered_at_once():
    config = on_mesh(1, 2, 4, run__remat="block", mesh__sequence=True, run__attention="splash")
    stream, most = 8 * 32 * D * 4, memory_of(config, TPU).total
    fewest = most - (GATHERED_STREAMS - MIN_GATHERED_STREAMS) * stream

    def total(usable):
        return memory_of(config, dataclasses.replace(TPU, usable=usable)).total

    assert total(most + 1) == most  # there is room
    between = (most + fewest) / 2
    assert total(between) == pytest.approx(between)  # it is made to fit
    assert total(fewest / 2) == pytest.approx(fewest)  # and cannot be


def test_gradients_are_summed_only_over_several_microbatches():
    once = memory_of(on_mesh(8, 1, 1, data__batch_size=16))
    twice = memory_of(on_mesh(8, 1, 1, data__batch_size=32, optimizer__accumulation_steps=2))
    assert twice.temporary - once.temporary == once.parameters
    assert twice.activations == once.activations


def test_parameters_are_kept_in_the_compute_dtype_too():
    wide, narrow = (
        memory_of(on_mesh(8, 1, 1, model__compute_dtype=dtype, run__attention="xla"))
        for dtype in ("float32", "bfloat16")
    )
    block = {"float32": 3 * 2 * 32 * F * 4, "bfloat16": 3 * 2 * 32 * F * 2}
    scores = 2 * 2 * N * 32 * 32 * 4
    for memory, dtype, copy in ((wide, "float32", 0), (narrow, "bfloat16", 0.5)):
        alive = max(block[dtype], scores)
        assert memory.temporary == (1 + copy) * memory.parameters + alive


def test_fsdp_gathers_a_block_the_next_and_its_gradients():
    memory = memory_of(on_mesh(1, 8, 1), TPU)
    layer = 4 * (2 * D * D + 2 * D * D * K // N + 3 * D * F)
    # Two rows of 32 positions and narrow heads, in blocks of 128 positions and 128 lanes.
    splash = 4 * 2 * (N + K) * 128 * 128 * 4
    assert memory.temporary == memory.parameters + splash + 3 * layer


def test_fsdp_keeps_no_matrices_for_the_backward_pass():
    copied, cut = (
        memory_of(on_mesh(*mesh, model__compute_dtype="bfloat16", run__attention="splash"), TPU)
        for mesh in ((8, 1, 1), (1, 8, 1))
    )
    matrices = 2 * L * (2 * D * D + 2 * D * D * K // N + 3 * D * F)
    assert copied.activations - cut.activations > matrices


def test_heads_narrower_than_the_lanes_are_padded_on_tpu_alone():
    model = make_config(model__compute_dtype="bfloat16").model
    on_tpu, on_gpu = (kept(model=model, is_tpu=is_tpu) for is_tpu in (True, False))
    head = D // N
    arrays = 2 * L * 32 * 2 * (2 * N + 2 * K)  # queries and outputs, keys and values, bfloat16
    assert on_tpu - on_gpu == pytest.approx(arrays * (128 - head), rel=1e-6)


@pytest.mark.parametrize(
    ("head", "is_padded"), [(4, False), (64, True), pytest.param(128, True, marks=pytest.mark.slow)]
)
def test_of_what_is_kept_by_name_wide_heads_are_padded_on_tpu(head, is_padded):
    model = make_config(model__compute_dtype="bfloat16", model__head_dim=head).model
    on_tpu, on_gpu = (
        kept(model=model, remat="save-matmuls", is_tpu=is_tpu) for is_tpu in (True, False)
    )
    tokens = L * 2 * 32
    padded = (N + K) * is_padded + K + N  # values and what attention returns always are
    assert on_tpu - on_gpu == tokens * 2 * padded * (128 - head)
    # Of a block beside its input: these, the logarithms of denominators, gate and up.
    kept_more = on_gpu - kept(model=model, remat="block")
    assert kept_more == tokens * (2 * (2 * N + 2 * K) * head + 4 * N + 2 * 2 * F)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_where_sums_are_all_reduced_that_of_the_output_matrix_is_unsharded(tied, microbatches):
    config = on_mesh(
        1, 8, 1, model__tied_embeddings=tied, optimizer__accumulation_steps=microbatches
    )
    ring, torus = (memory_of(config, CHIPS[chip]).total for chip in ("v5e", "v5p"))
    assert torus - ring == (0 if tied or microbatches == 1 else V * D * 4)


def test_tpus_pad_parameters_that_do_not_fill_their_tiles():
    on_tpu, on_gpu = (memory_of(on_mesh(8, 1, 1), chip).parameters for chip in (TPU, GPU))
    table, heads, kv_heads = 128 * D, 3 * 128 * N * 4, 3 * 128 * K * 4  # their longest axis: 96, 48
    mlp = 3 * 128 * D  # 80 or 48 columns
    norms = 2 * 4 * 128 + 128  # three rows of 48, as four; and one of 48
    assert on_tpu == 4 * (2 * table + 2 * heads + 2 * kv_heads + 3 * mlp + norms) > on_gpu


def test_gradient_sums_of_the_embedding_are_row_major_on_tpu():
    once, twice = (
        memory_of(on_mesh(1, 8, 1, data__batch_size=16 * n, optimizer__accumulation_steps=n), TPU)
        for n in (1, 2)
    )
    filled = 4 * (V * 128 - 8 * 128)  # six columns a device; the parameters lie the other way
    assert twice.temporary - once.temporary == once.parameters + filled


@pytest.mark.parametrize(("fsdp", "rows", "table"), [(1, 2, 0), (8, 2, 4), (8, 64, 8)])
def test_the_loss_needs_logits_their_gradient_and_with_fsdp_the_output_matrix(fsdp, rows, table):
    large, tokens = 48000, min(32 * rows, 1024)
    memory = memory_of(
        on_mesh(8 // fsdp, fsdp, 1, model__vocab_size=large, data__batch_size=8 * rows)
    )
    assert memory.temporary == tokens * large * 8 + table * large * D


def test_the_estimate_computes_nothing(monkeypatch):
    monkeypatch.setattr(jax, "device_put", None)
    config = changed(on_mesh(8, 1, 1), "model", dim=96)
    assert memory_of(config).total > 0
    assert config.mesh == MeshConfig(data=8)
