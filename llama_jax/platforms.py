"""Which kind of device a program is being traced for: forms of arithmetic are chosen by it."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh that is set, else of this process's devices.

    The two differ where a program is compiled for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
