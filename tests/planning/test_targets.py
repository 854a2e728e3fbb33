"""Targets by name."""

import pytest

from llama_jax.errors import UsageError
from llama_jax.planning.targets import parse_target


@pytest.mark.parametrize(
    ("name", "chip", "devices", "topology"),
    [
        ("v5e-1", "v5e", 1, "v5e:1x1"),
        ("v5e-8", "v5e", 8, "v5e:2x4"),
        ("v5litepod-16", "v5e", 16, "v5e:4x4"),
        ("v6e-8", "v6e", 8, "v6e:2x4"),
        ("v5p-64", "v5p", 32, "v5p:2x4x4"),  # named by cores, of which a chip has two
        ("v4-16", "v4", 8, "v4:2x2x2"),
        ("v3-8", "v3", 8, "v3:2x2"),  # a device is a core
        ("tpu7x-8", "tpu7x", 8, "tpu7x:2x2x1"),
        ("v5e:4x8", "v5e", 32, "v5e:4x8"),
        ("v5p:4x4x12", "v5p", 192, "v5p:4x4x12"),
        ("H200-1", "H200", 1, ""),
        ("h200-16", "H200", 16, ""),
        ("A100-40-8", "A100-40", 8, ""),
    ],
)
def test_a_name_gives_chip_number_and_shape(name, chip, devices, topology):
    target = parse_target(name)
    assert (target.chip.name, target.devices, target.topology) == (chip, devices, topology)


def test_a_description_says_how_the_name_was_understood():
    assert parse_target("v5p-64").description == "v5p-64: 32 × TPU v5p, slice 2x4x4"
    assert parse_target("v3-8").description == "v3-8: 8 × TPU v3 halves, slice 2x2"
    assert parse_target("H200-8").description == "H200-8: 8 × H200, estimated only"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v5x-8", "chip 'v5x' is unknown; did you mean 'v5p'"),
        ("H20-8", "did you mean 'H200-8'"),
        ("A100-8", "did you mean 'A100-40-8' or 'A100-80-8'?"),
        ("H10-8", "did you mean 'H100-8' or 'H100-PCIe-8'?"),
        ("v5e-7", "no v5e slice of 7 chips; the nearest is v5e-8"),
        ("v5p-60", "no v5p slice of 60 TensorCores; the nearest is v5p-64"),
        ("v5e-0", "the nearest is v5e-1"),
        ("H200-3", "has 3 GPUs; expected 1, 2, 4 or a multiple of 8"),
        ("H200-0", "has 0 GPUs"),
        ("H200:2x2", "only TPU slices have a shape"),
        ("v5e:2x0", "is not a chip and a number of chips"),
        ("v5e:2x2x2", "a v5e slice has 2 axes, not 3; expected such as v5e:2x4"),
        ("v5p:2x4", "a v5p slice has 3 axes, not 2; expected such as v5p:2x2x2"),
        ("v5e", "expected such as v5e-8 or H200-1"),
        (
            "v5e8",
            "expected such as v5e-8 or H200-1; did you mean 'v5e-8'",
        ),
        ("v5e:3x5", "there is no v5e slice 3x5; expected one of 1x1, 2x2, 2x4, 4x4"),
        ("v5e:4x2", "there is no v5e slice 4x2"),
        ("v5p:4x8x6", "there is no v5p slice 4x8x6; expected one of 1x1x1, 2x2x1"),
        ("v5p:8x4x4", "or rising multiples of 4 such as 4x4x12"),
        ("", "expected such as v5e-8 or H200-1"),
    ],
)
def test_an_invalid_name_is_refused_in_one_line(name, complaint):
    with pytest.raises(UsageError) as error:
        parse_target(name)
    assert complaint in str(error.value) and "\n" not in str(error.value)
