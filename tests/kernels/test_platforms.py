"""Which kind of device a program is traced for."""

import jax
from jax.sharding import AbstractMesh, AxisType

from llama_jax.kernels.matmul import platform


class OtherDevice:
    platform = "tpu"


def test_without_a_mesh_it_is_this_process_s():
    assert platform() == jax.default_backend() == "cpu"


def test_a_mesh_of_these_devices_changes_nothing():
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        assert platform() == "cpu"


def test_a_mesh_of_other_devices_decides(monkeypatch):
    mesh = jax.sharding.get_abstract_mesh()
    assert isinstance(mesh, AbstractMesh)

    class Elsewhere:
        abstract_device = OtherDevice

    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: Elsewhere)
    assert platform() == "tpu"
