"""The formula of MFU, and the peaks it is a share of."""

from types import SimpleNamespace

import pytest

from llama_jax.config import ModelConfig
from llama_jax.hardware.flops import flops_per_token, peak_flops

SIZES = {"vocab_size": 53, "dim": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
SIZES |= {"hidden_dim": 40, "context_length": 32}
BLOCK = 2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 40 + 2 * 24  # wq wo, wk wv, gate up down, norms


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_formula_and_a_table_only_looked_up_is_none(tied):
    config = ModelConfig(**SIZES, tied_embeddings=tied)
    parameters = 53 * 24 + 3 * BLOCK + 24
    attention = 12 * 3 * 6 * 4 * 11  # layers, heads, their width, tokens
    assert flops_per_token(config, 11) == 6 * parameters + attention


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", 0)],
)
def test_a_peak_is_the_chips_unless_it_is_given(kind, peak):
    device = SimpleNamespace(device_kind=kind)
    assert peak_flops(device) == peak
    assert peak_flops(device, given=3e12) == 3e12
