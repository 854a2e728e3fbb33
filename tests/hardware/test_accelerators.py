"""The table of chips, and the chip of a device."""

from types import SimpleNamespace

import pytest

from llama_jax.hardware.accelerators import CHIPS, GIB, adds_along_all_axes, chip_of, peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v2", "v2"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
    ],
)
def test_the_chip_of_a_device_kind(kind, name):
    chip = chip_of(kind)
    assert chip is not None and chip.name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "NVIDIA GH200 480GB", "TPU v55"])
def test_a_similar_device_kind_is_unknown(kind):
    assert chip_of(kind) is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_data_sheet_figures_are_plausible(chip):
    assert 20e12 < chip.flops < 1e16
    assert 0.7 * chip.memory < chip.usable < chip.memory
    assert 7 * GIB < chip.memory < 300 * GIB
    assert 2e11 < chip.bandwidth < 1e13
    assert 3e10 <= chip.link < chip.bandwidth
    assert bool(chip.capability) != chip.is_tpu


def test_usable_memory_is_what_libtpu_reports():
    assert CHIPS["v5e"].usable == 15.75 * GIB
    assert CHIPS["v6e"].usable == 31.25 * GIB


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", 0)],
)
def test_peak_flops_are_those_of_the_chip_unless_set(kind, peak):
    device = SimpleNamespace(device_kind=kind)
    assert peak_flops(device) == peak
    assert peak_flops(device, given=3e12) == 3e12


def test_slices_in_which_xla_adds_up_along_all_axes():
    """As the compiler of libtpu 0.0.42.1 makes it of `psum_scatter`."""
    rings = {"v5e": (1, 4, 8, 32, 128), "v6e": (8,), "v5p": (4,), "H200": (8,)}
    others = {"v5e": (16, 64, 256), "v6e": (16, 256), "v5p": (8, 16, 32, 64)}
    for expected, slices in ((False, rings), (True, others)):
        for chip, counts in slices.items():
            assert {adds_along_all_axes(CHIPS[chip], count) for count in counts} == {expected}
