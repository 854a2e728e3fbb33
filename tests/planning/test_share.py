"""One device's share of a step."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from plans import make_config

from llama_jax.config import MeshConfig
from llama_jax.errors import UsageError
from llama_jax.hardware.accelerators import CHIPS
from llama_jax.planning.memory import (
    attention_backend,
    bytes_on_one,
    model_share,
    planned_mesh,
    require_rows,
)


def test_a_mesh_of_devices_that_are_not_here():
    mesh = planned_mesh(MeshConfig(data=2, fsdp=-1, tensor=4), 1024)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 128, "tensor": 4}
    with pytest.raises(UsageError, match="do not arrange 10 devices"):
        planned_mesh(MeshConfig(data=1, tensor=4, fsdp=-1), 10)


def test_rows_are_those_of_a_microbatch_on_one_device():
    config = make_config(optimizer__accumulation_steps=2)
    assert require_rows(config, planned_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)) == 2


def test_a_batch_that_does_not_divide_is_refused():
    config = make_config(data__batch_size=12)
    with pytest.raises(UsageError, match=r"data\.batch_size=12 does not divide"):
        require_rows(config, planned_mesh(MeshConfig(data=8), 8))


def test_a_tensor_axis_cuts_heads_columns_and_vocabulary_but_not_the_width():
    share = model_share(make_config().model, 4)
    assert (share.num_heads, share.num_kv_heads, share.ffn_dim, share.vocab_size) == (3, 1, 20, 24)
    assert (share.dim, share.head_size) == (48, 4)


def test_fewer_kv_heads_than_devices_leave_each_device_one():
    share = model_share(make_config(model__num_kv_heads=2).model, 4)
    assert (share.num_heads, share.num_kv_heads) == (3, 1)


def test_bytes_are_those_of_one_device():
    mesh = planned_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 8)
    tree = {"a": jax.ShapeDtypeStruct((8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((3,), "int8")}
    places = {
        "a": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    assert bytes_on_one(tree, places, is_tpu=False) == 2 * 3 * 4 + 3
    assert bytes_on_one(tree, places, is_tpu=True) == 2 * 128 * 4 + 128


@pytest.mark.parametrize(
    ("chip", "changes", "backend"),
    [
        ("v5e", {}, "splash"),
        ("v5e", {"model__dropout": 0.1}, "xla"),
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
