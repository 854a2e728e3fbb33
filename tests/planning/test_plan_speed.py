"""Predicted speed of a training step."""

import pytest
from plans import make_config

from llama_jax.hardware.accelerators import CHIPS
from llama_jax.model.parameters import count_parameters, flops_per_token
from llama_jax.planning.memory import abstract_mesh, training_memory
from llama_jax.planning.speed import Speed, training_speed

CHIP = CHIPS["v5e"]


def speed_of(data=1, fsdp=1, tensor=1, **changes):
    config = make_config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, **changes)
    mesh = abstract_mesh(config.mesh, data * fsdp * tensor)
    return training_speed(config, mesh, CHIP, training_memory(config, mesh, CHIP)), config


def test_the_bottleneck_is_the_longest():
    assert Speed(2.0, 3.0, 1.0).bottleneck == "memory" and Speed(2.0, 3.0, 1.0).seconds == 3.0
    assert Speed(2.0, 1.0, 2.5).bottleneck == "network"


def test_arithmetic_time():
    speed, config = speed_of(data=4)
    flops = 16 * 32 * flops_per_token(config.model, 32)
    assert speed.arithmetic == pytest.approx(flops / 4 / CHIP.flops)


@pytest.mark.slow
def test_recomputation_counts():
    none, qkv, block = (
        speed_of(run__remat=name)[0].arithmetic for name in ("none", "save-qkv", "block")
    )
    assert none < qkv < block < 4 / 3 * none
    assert speed_of(run__remat="offload")[0].arithmetic == qkv


def test_one_device_sends_nothing():
    assert speed_of()[0].network == 0


def test_data_parallelism_sends_gradients_once_a_step_however_many_microbatches():
    once, often = (speed_of(data=4, optimizer__accumulation_steps=n)[0].network for n in (1, 4))
    parameters = 4 * count_parameters(make_config().model)
    assert once == often == pytest.approx(2 * 3 / 4 * parameters / (CHIP.link / 2))


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_sends_blocks_the_output_matrix_and_rows_of_the_embedding(dtype, width, tied):
    changes = {"model__compute_dtype": dtype, "model__tied_embeddings": tied}
    speed, config = speed_of(fsdp=4, optimizer__accumulation_steps=2, **changes)
    table = config.model.vocab_size * config.model.dim
    blocks = count_parameters(config.model) - (1 if tied else 2) * table
    looked_up = 2 * 32 * config.model.dim  # two rows a device and microbatch
    once = 3 * blocks * width + table * (width + 4) + 2 * looked_up * width
    assert speed.network == pytest.approx(2 * 3 / 4 * once / (CHIP.link / 2))


def test_a_tensor_axis_sends_the_residual_stream_of_every_block():
    wide, narrow = (speed_of(tensor=4, data__batch_size=n)[0].network for n in (16, 8))
    assert wide == 2 * narrow > 0


def test_more_memory_traffic_for_more_microbatches():
    one, four = (speed_of(optimizer__accumulation_steps=n)[0].memory for n in (1, 4))
    assert one < four < 4 * one
