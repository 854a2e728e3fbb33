"""One device's shard of a step, and how a TPU pads its arrays."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from plans import make_config

from llama_jax.config import MeshConfig
from llama_jax.errors import UsageError
from llama_jax.hardware.accelerators import CHIPS
from llama_jax.planning.memory import (
    abstract_mesh,
    attention_backend,
    device_bytes,
    model_shard,
    padded_row_major_size,
    padded_size,
    sequences_per_device,
)


def test_a_mesh_of_devices_that_are_not_here():
    mesh = abstract_mesh(MeshConfig(data=2, fsdp=-1, tensor=4), 1024)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 128, "tensor": 4}
    with pytest.raises(UsageError, match="do not multiply to 10 devices"):
        abstract_mesh(MeshConfig(data=1, tensor=4, fsdp=-1), 10)


def test_sequences_of_a_microbatch_on_one_device():
    config = make_config(optimizer__accumulation_steps=2)
    assert sequences_per_device(config, abstract_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)) == 2


def test_a_batch_that_does_not_divide_is_refused():
    config = make_config(data__batch_size=12)
    with pytest.raises(UsageError, match=r"data\.batch_size=12 does not divide"):
        sequences_per_device(config, abstract_mesh(MeshConfig(data=8), 8))


def test_a_tensor_axis_shards_heads_columns_and_vocabulary_but_not_the_width():
    shard = model_shard(make_config().model, 4)
    assert (shard.num_heads, shard.num_kv_heads, shard.ffn_dim, shard.vocab_size) == (3, 1, 20, 24)
    assert (shard.dim, shard.head_size) == (48, 4)


def test_fewer_kv_heads_than_devices_leave_one_per_device():
    shard = model_shard(make_config(model__num_kv_heads=2).model, 4)
    assert (shard.num_heads, shard.num_kv_heads) == (3, 1)


def test_bytes_on_one_device():
    mesh = abstract_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 8)
    tree = {"a": jax.ShapeDtypeStruct((8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((3,), "int8")}
    places = {
        "a": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    assert device_bytes(tree, places, is_tpu=False) == 2 * 3 * 4 + 3
    assert device_bytes(tree, places, is_tpu=True) == 2 * 128 * 4 + 128


@pytest.mark.parametrize(
    ("chip", "changes", "backend"),
    [
        ("v5e", {}, "splash"),
        ("v5e", {"model__dropout": 0.1}, "splash"),
        ("v5e", {"run__attention": "xla"}, "xla"),
        ("H200", {"model__compute_dtype": "bfloat16", "model__dim": 96}, "cudnn"),
        ("H200", {}, "xla"),  # cuDNN computes in bfloat16
        ("T4", {"model__compute_dtype": "bfloat16"}, "xla"),  # too old for cuDNN's
    ],
)
def test_the_attention_kernel_is_the_one_the_chip_would_run(chip, changes, backend):
    assert attention_backend(make_config(**changes), CHIPS[chip]) == backend


def test_a_kernel_that_the_chip_lacks_is_refused():
    with pytest.raises(UsageError, match="splash"):
        attention_backend(make_config(run__attention="splash"), CHIPS["H200"])


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((), 128),
        ((3,), 128),
        ((1, 1), 128),
        ((8, 128), 8 * 128),
        ((1024, 16), 16 * 1024),  # the long axis lies along the lanes
        ((352, 16), 16 * 384),
        ((5, 256, 352), 5 * 256 * 352),  # 256 along the lanes, 352 in rows of eight
        ((4, 16, 2, 32), 4 * 16 * 2 * 128),
        ((7, 9, 6, 48), 8 * 9 * 6 * 128),
    ],
)
def test_the_dims_that_need_the_least_padding_are_tiled(shape, numbers):
    assert padded_size(shape) == numbers


def test_a_row_major_matrix_is_padded_along_its_rows():
    assert padded_row_major_size((1024, 16)) == 1024 * 128
    assert padded_row_major_size((1023, 130)) == 1024 * 256
    assert padded_row_major_size((2, 5)) == 2 * 128
