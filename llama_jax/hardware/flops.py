"""How much arithmetic training takes, and the share of a device's peak that a speed is (MFU).

Counts what the mathematics needs, so that speeds of different programs compare: nothing that is
computed again to save memory, and attention as if no position were masked.
"""

import jax

from llama_jax.config import ModelConfig
from llama_jax.hardware.accelerators import chip_of
from llama_jax.model.transformer import count_parameters


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs a token: 6·N + 12·L·H·Q·T (Chowdhery et al. 2022, PaLM, appendix B).

    N: parameters, the vocabulary's table once: tied, it is the output matrix; else the output
    matrix counts and the input's table, which is only looked up, does not. L: layers, H: query
    heads, Q: width of a head, T: `sequence_length`.
    """
    looked_up = 0 if config.tied_embeddings else config.vocab_size * config.dim
    N, L = count_parameters(config) - looked_up, config.num_layers
    H, Q, T = config.num_heads, config.head_dim, sequence_length
    return 6 * N + 12 * L * H * Q * T


def peak_flops(device: jax.Device, given: float = 0.0) -> float:
    """The peak FLOP/s of one device: as given, else dense bfloat16 of its chip; 0: not known."""
    chip = chip_of(device.device_kind)
    return given or (chip.flops if chip else 0.0)
