"""Models whose matrices are small integers: `quantize` makes one of a float model."""

from llama_jax.quantization.surgery import (
    GROUP_SIZES,
    KINDS,
    abstract_quantized,
    held_bytes,
    quantize,
)

__all__ = ["GROUP_SIZES", "KINDS", "abstract_quantized", "held_bytes", "quantize"]
